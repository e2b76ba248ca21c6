"""A GPU that torch believes in: ``torch.cuda`` describes it, and tensors on it have a shape and no data.

Only in a process of its own. What is done here cannot be undone.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_warmstart.deepgemm.identity import Gpu

# Megabytes, as nvidia-smi prints them: SGLang's default prefill chunk depends on it. Source: NVIDIA's data sheets.
MEMORY_MIB: Mapping[str, int] = {
    "NVIDIA H20": 97871,
    "NVIDIA H100 80GB HBM3": 81559,
    "NVIDIA H100 PCIe": 81559,
    "NVIDIA H200": 143771,
    "NVIDIA GH200 480GB": 97871,
    "NVIDIA B200": 183359,
    "NVIDIA GB200": 189471,
    "NVIDIA B300": 275040,
    "NVIDIA GB300": 284208,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 97887,
}
# SGLang asks for the CUDA version of the torch that will serve: a build for one that it supports on all these GPUs.
_CUDA = "13.0"
_NCCL = (2, 28, 9)


class _Stream:
    """A stream or an event. Nothing runs on it."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None: ...

    record = synchronize = wait = wait_event = wait_stream = _nothing

    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> _Stream:
        return _Stream()

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


class _Chosen(contextlib.ContextDecorator):
    """``torch.cuda.device(n)`` and ``torch.cuda.stream(s)``."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> _Chosen:
        return self

    def __exit__(self, *_: object) -> None: ...


def pretend(gpu: Gpu, count: int) -> contextlib.AbstractContextManager[Any]:
    """Let torch say that it runs on ``count`` of these GPUs. Returns what lets tensors be made on them.

    Args:
        gpu: which one.
        count: as many as the server has on a node.
    """
    # These import what they need of CUDA. On a CPU build that has to happen before it says that it has CUDA.
    import torch._dynamo
    import torch._inductor.utils

    memory = MEMORY_MIB[gpu.name] << 20
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.num_sms,
        total_memory=memory,
        warp_size=32,
        is_integrated=False,
        L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
        gcnArchName="",
        uuid="0",
    )
    stream = _Stream()

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: value

    nothing = answer(None)
    answers: dict[str, Any] = {
        "is_available": answer(True),
        "is_initialized": answer(True),
        "is_bf16_supported": answer(True),
        "is_current_stream_capturing": answer(False),
        "device_count": answer(count),
        "current_device": answer(0),
        "get_device_capability": answer(gpu.capability),
        "get_device_properties": answer(properties),
        "get_device_name": answer(gpu.name),
        "get_arch_list": answer([f"sm_{gpu.capability[0]}{gpu.capability[1]}"]),
        "mem_get_info": answer((memory, memory)),
        "memory_stats": answer({}),
        "can_device_access_peer": answer(True),
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": _Chosen,
        "device": _Chosen,
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), answer(0)),
        **dict.fromkeys(("init", "synchronize", "empty_cache", "set_device", "set_stream", "_lazy_init"), nothing),
        **dict.fromkeys(("reset_peak_memory_stats", "manual_seed", "manual_seed_all", "ipc_collect"), nothing),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = _CUDA
    torch.cuda.nccl.version = answer(_NCCL)
    torch._C._cuda_getDeviceCount = answer(count)
    torch._C._cuda_getCurrentRawStream = answer(0)
    return _on_the_gpu()


@contextlib.contextmanager
def _on_the_gpu() -> Iterator[None]:
    with _SaidToBeThere(), _WithoutData():
        yield


# Torch's own device for tensors without data. Its others need a build of torch that has them.
_NO_DATA = torch.device("meta")
_SAYS_DEVICE, _SAYS_CUDA, _SAYS_META = (
    getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_meta")
)


class _SaidToBeThere(TorchFunctionMode):  # type: ignore[misc]
    """What is put on the GPU is put where tensors have no data, and says that it is on the GPU."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.cuda:
            return args[0].to(_NO_DATA)
        if func == _SAYS_CUDA:
            return _SAYS_META(*args)
        if func == _SAYS_DEVICE:
            found = func(*args)
            return torch.device("cuda", 0) if found == _NO_DATA else found
        if func == torch.Tensor.data_ptr and _SAYS_META(args[0]):
            return id(args[0])  # no two are in one place
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        # Only CUDA can pin.
        named = {name: _placed(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(_placed, args), **named)


def _placed(value: Any) -> Any:
    is_gpu = value.startswith("cuda") if isinstance(value, str) else _is_on_gpu(value)
    return _NO_DATA if is_gpu else value


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


class _WithoutData(TorchDispatchMode):  # type: ignore[misc]
    """Makes up values where Python asks for one.

    Such a value may be a token count and never the size of a weight: a model takes those from its configuration.
    """

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if name == "aten::is_pinned":
            return False
        if name in ("aten::_pin_memory", "aten::pin_memory", "aten::record_stream"):
            return args[0]
        if not any(isinstance(leaf, torch.Tensor) and _SAYS_META(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            return _value(args[0].dtype)
        if name in ("aten::equal", "aten::is_nonzero", "aten::allclose"):
            return True
        if name == "aten::copy_" and not _SAYS_META(args[0]):
            return args[0]
        if name == "aten::_to_copy" and kwargs.get("device", _NO_DATA).type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        if "generator" in kwargs:
            kwargs["generator"] = None
        return func(*args, **kwargs)


def _value(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
