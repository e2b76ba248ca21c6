"""F6: each distinct kernel is compiled once, all of them at the same time, and a restart compiles none.

SGLang's warm-up runs a GEMM for every M, or a sample of them, and compiles what it meets, one kernel after another.
Here DeepGEMM itself is asked which kernels it would compile (:mod:`sglang_warmstart.kernels`), by one service per node.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.announce import LOGGER_NAME
from sglang_warmstart.errors import StandsAsideError
from sglang_warmstart.features.deep_gemm_rank import START_WAIT_S, Rank
from sglang_warmstart.features.envs import ENVIRON, declare_text
from sglang_warmstart.features.fast_warmup import COMPILE_ONE, COMPILE_UTILS, ENTRYPOINT, chunked_prefill_size
from sglang_warmstart.features.feature import Feature, Step
from sglang_warmstart.features.hc_prenorm import DIRECT
from sglang_warmstart.features.pp_parallel_warmup import MODEL_RUNNER, forward_modes_of
from sglang_warmstart.kernels.client import ServiceClient, ServiceGoneError
from sglang_warmstart.kernels.compiler import Kind
from sglang_warmstart.kernels.identity import Gpu
from sglang_warmstart.kernels.launch import start_service
from sglang_warmstart.kernels.marker import Launch, TargetKernels
from sglang_warmstart.kernels.protocol import Hello
from sglang_warmstart.patch import Patch, check_parameters, class_of
from sglang_warmstart.shapes.m_list import fast_m_list, full_m_list
from sglang_warmstart.switches import COMPILER, WORKERS, complaint_about, number_of

ENGINE = "sglang.srt.entrypoints.engine"
MAYBE_COMPILE = "_maybe_compile_deep_gemm_one_type_all"

# How a rank finds the service of its node; set by the process that starts both.
SERVICE = "SGLANG_WARMSTART_SERVICE"

# What else a rank's DeepGEMM and its search for a compiler read.
_PLACES = ("CUDA_HOME", "CUDA_PATH", "PATH")
# The arguments of a server that decide which GEMMs its ranks call. One that is missing here costs little: what a marker
# does not know is warmed when it is first called.
_DECIDING_ARGUMENTS = (
    "model_path",
    "revision",
    "quantization",
    "dtype",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "enable_dp_attention",
    "moe_dense_tp_size",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "moe_a2a_backend",
    "moe_runner_backend",
    "deepep_mode",
    "chunked_prefill_size",
    "max_prefill_tokens",
    "disaggregation_mode",
    "speculative_algorithm",
    "enable_two_batch_overlap",
    "enable_lora",
)

logger = logging.getLogger(LOGGER_NAME)


@dataclass
class _Process:
    """This process's rank, once it has one.

    Args:
        is_wanted: whether SGLang warms DeepGEMM here. All ranks of a server answer alike.
        get_num_sms: DeepGEMM's, once there is a rank.
        known: SGLang's keys of the GEMMs that are seen to, and their number of SMs.
    """

    rank: Rank | None = None
    is_wanted: bool = False
    get_num_sms: Callable[[], int] | None = None
    known: set[tuple[int, int, int, int, int]] = field(default_factory=set)

    def connect(self, rank: Rank) -> None:
        """From now on this is a rank."""
        self.rank, self.get_num_sms = rank, rank.library.get_num_sms

    def forget(self) -> None:
        """As if it had never been one."""
        self.rank, self.get_num_sms, self.is_wanted = None, None, False
        self.known.clear()


def is_wanted() -> bool:
    """Whether SGLang's switches leave DeepGEMM's warm-up on."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_JIT_DEEPGEMM.get() and envs.SGLANG_JIT_DEEPGEMM_PRECOMPILE.get())


def install_service(patch: Patch, engine: ModuleType) -> None:
    """Start the service with the schedulers: it ends with the process that starts them."""

    def launch_scheduler_processes(
        original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if server_args.device == "cuda" and is_wanted() and importlib.util.find_spec("deep_gemm") is not None:
            os.environ.pop(SERVICE, None)
            try:
                os.environ[SERVICE] = str(start_service().socket)
            except OSError as error:
                logger.warning("warmstart: no service for exact warm-up: %s", error)
        return original(cls, server_args, *args, **kwargs)

    patch.wrap(
        class_of(engine, "Engine"),
        "_launch_scheduler_processes",
        launch_scheduler_processes,
        "cls, server_args, port_args, run_scheduler_process_func",
        "cls, server_args, port_args, run_scheduler_process_func, placement_group",
    )


def install_switch(patch: Patch, environ: ModuleType) -> None:
    """Declare the choice of the compiler on ``Envs``."""
    declare_text(patch, environ, COMPILER)


def install_hooks(patch: Patch, compile_utils: ModuleType, entrypoint: ModuleType, process: _Process) -> None:
    """Connect each rank when its configuration is known, and take the place of SGLang's own decision."""
    original = getattr(compile_utils, MAYBE_COMPILE, None)
    if original is None:
        raise StandsAsideError(f"{COMPILE_UTILS}.{MAYBE_COMPILE}", "not there")
    check_parameters(original, ("kernel_type, n, k, num_groups",), f"{COMPILE_UTILS}.{MAYBE_COMPILE}")
    known = process.known

    @functools.wraps(original)
    def maybe_compile(kernel_type: Any, n: int, k: int, num_groups: int) -> None:
        # On the path of every GEMM: nothing here but a look into a set.
        get_num_sms = process.get_num_sms
        if get_num_sms is None:
            original(kernel_type, n, k, num_groups)
            return
        key = (kernel_type, n, k, num_groups, get_num_sms())
        if key not in known:
            meet(key)

    def meet(key: tuple[Any, int, int, int, int]) -> None:
        import torch

        rank = process.rank
        assert rank is not None
        named = (key[0].name, *key[1:])
        if named in rank.seen:
            known.add(key)
        elif not torch.cuda.is_current_stream_capturing():
            # A kernel that is captured cannot be warmed in passing: DeepGEMM loads it, as it would.
            rank.meet(named)

    def sweep(name: str, n: int, k: int, num_groups: int, fast: bool) -> None:
        kernel_type = compile_utils.DeepGemmKernelType[name]
        if not fast:
            original(kernel_type, n, k, num_groups)
        elif compile_utils._DO_COMPILE_ALL:
            getattr(compile_utils, COMPILE_ONE)(kernel_type, n, k, num_groups, fast_m_list(chunk[0]))

    chunk: list[int] = []

    def update_deep_gemm_config(update: Callable[..., None], gpu_id: int, *args: Any, **kwargs: Any) -> None:
        from sglang.srt.environ import envs

        update(gpu_id, *args, **kwargs)
        if process.rank is None and compile_utils.ENABLE_JIT_DEEPGEMM and is_wanted():
            process.is_wanted = True
            chunk[:] = [chunked_prefill_size(compile_utils, *args, **kwargs)]
            strict = bool(envs.SGLANG_WARMSTART_STRICT.get())
            try:
                arguments = server_arguments(*args, **kwargs)
                rank = connected_rank(compile_utils, entrypoint, chunk[0], arguments, sweep)
            except Exception as error:
                # Whatever a fork looks like: SGLang starts, and warms as it does.
                if strict:
                    raise
                _refuse(f"{type(error).__name__}: {error}", strict)
                rank = None
            if rank is not None:
                process.connect(rank)

    patch.wrap(compile_utils, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")
    patch.replace(compile_utils, MAYBE_COMPILE, maybe_compile)
    patch.also_undo(process.forget)


def server_arguments(server_args: Any = None) -> Any:
    """The server's arguments, which 0.5.23 keeps in its runtime context."""
    if server_args is None:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    return server_args


def connected_rank(
    compile_utils: ModuleType,
    entrypoint: ModuleType,
    chunk: int,
    server_args: Any,
    sweep: Callable[[str, int, int, int, bool], None],
) -> Rank | None:
    """This process's rank, or None where nothing can be warmed exactly; then SGLang warms as it does."""
    from sglang.srt.environ import envs

    strict = bool(envs.SGLANG_WARMSTART_STRICT.get())
    path = os.environ.get(SERVICE)
    if path is None:
        _refuse("no service was started with this server", strict)
        return None
    library = compile_utils.deep_gemm
    kind: Kind = "nvrtc" if getattr(envs, COMPILER.name).get() == "nvrtc" else "nvcc"
    cache = os.environ["DG_JIT_CACHE_DIR"]
    if kind == "nvrtc":
        # Kernels of another compiler than DeepGEMM's own: once this is switched off again, none of them is in use.
        cache = str(Path(cache, "nvrtc"))
    for complaint in (complaint_about(switch, os.environ) for switch in (COMPILER, WORKERS)):
        if complaint:
            logger.warning("warmstart: %s", complaint)
    environment = {name: value for name, value in os.environ.items() if name.startswith("DG_") or name in _PLACES} | {
        "DG_JIT_CACHE_DIR": cache
    }
    try:
        client = ServiceClient(Path(path))
        welcome = client.hello(
            Hello(
                cache=cache,
                environment=environment,
                deep_gemm=str(Path(library.__file__).parent),
                gpu=_gpu(),
                launch=_launch(server_args),
                kind=kind,
                # Not by ``envs``: 0.5.12's default of 4 is nobody's wish, and 0.5.23 does not know it.
                workers=number_of(WORKERS, os.environ),
            )
        )
    except ServiceGoneError as error:
        _refuse(str(error), strict)
        return None

    @contextmanager
    def outside() -> Iterator[None]:
        saved = compile_utils.disable_symmetric_memory_context()
        try:
            yield
        finally:
            compile_utils.restore_symmetric_memory_context(saved)

    for note in welcome.notes:
        logger.warning("warmstart: %s", note)
    if welcome.problem:
        _refuse(welcome.problem, strict)
        return None
    os.environ["DG_JIT_CACHE_DIR"] = cache
    if envs.SGLANG_JIT_DEEPGEMM_FAST_WARMUP.get():
        logger.info("warmstart: exact warm-up takes the place of FAST_WARMUP: it covers every M, and costs less")
    return Rank(
        client=client,
        library=library,
        entrypoint=entrypoint,
        direct=lambda _, function: getattr(function, DIRECT, None) or function,
        m_max=full_m_list(chunk)[-1],
        # Asked now, while there is time: where there is no marker, the service gets ready to record.
        restored=_restored(client),
        strict=strict,
        free_bytes=_free_bytes,
        sweep=sweep,
        outside_symmetric_memory=outside,
    )


def _refuse(reason: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(f"exact warm-up is not possible: {reason}")
    logger.warning("warmstart: no exact warm-up, SGLang warms DeepGEMM in its own way: %s", reason)


def _gpu() -> Gpu:
    import torch

    ordinal = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(ordinal)
    return Gpu(
        name=properties.name,
        num_sms=properties.multi_processor_count,
        capability=(properties.major, properties.minor),
        ordinal=ordinal,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _free_bytes() -> int:
    import torch

    # What the allocator holds and does not use, it gives up for another tensor.
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0] + unused)


def _launch(server_args: Any) -> Launch:
    from sglang.srt.distributed.parallel_state import get_world_group

    # In 0.5.23 the arguments themselves are what the user gave, before anything was decided.
    arguments = server_args.resolved_dict() if hasattr(server_args, "resolved_dict") else vars(server_args)
    launch = {name: str(arguments.get(name)) for name in _DECIDING_ARGUMENTS}
    launch["rank"] = str(get_world_group().rank)
    if hasattr(server_args, "get_model_config"):
        config = server_args.get_model_config().hf_config
        launch["config"] = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    return launch


def install_discovery(patch: Patch, model_runner: ModuleType, process: _Process) -> None:
    """Before anything else runs a forward, find out the targets of the rank and warm all of them at once."""
    runner_class = class_of(model_runner, "ModelRunner")
    if "kernel_warmup" not in vars(runner_class):
        return  # a later release: each target is met when it is first called

    def kernel_warmup(original: Callable[..., None], self: Any) -> None:
        if process.is_wanted and may_run_dry(self):
            rank = process.rank
            # A rank that has no service would not run the forwards in which the others wait for it.
            agreed = _all_agree(self.tp_group, rank is not None)
            if rank is not None and agreed:
                warm_all(rank, self)
            elif rank is not None:
                logger.warning("warmstart: not all ranks have a service: targets are warmed when they are first called")
        original(self)

    patch.wrap(runner_class, "kernel_warmup", kernel_warmup, "self")


def may_run_dry(model_runner: Any) -> bool:
    """Whether dry forwards can run. It follows from arguments that all ranks share."""
    return (
        model_runner.device == "cuda"
        and not model_runner.is_draft_worker
        and not model_runner.spec_algorithm.is_speculative()
    )


def warm_all(rank: Rank, model_runner: Any) -> None:
    """Warm all targets of a rank: those of the marker, or those that dry forwards find."""
    group = model_runner.tp_group
    start = dry_done = time.perf_counter()
    # A dry forward holds collectives: all ranks run it, or none.
    if _all_agree(group, bool(rank.restored)):
        rank.load(rank.restored)
        how, count = "restored from the marker", len(rank.restored)
    else:
        targets = found_dry(rank, model_runner)
        dry_done = time.perf_counter()
        rank.warm(targets, START_WAIT_S)
        how, count = "found by dry forwards", len(targets)
    end = time.perf_counter()
    logger.info(
        "warmstart: exact warm-up: %d targets %s, %d kernels compiled on this node: "
        "dry forwards %.2f s, wait %.2f s, load %.3f s",
        count,
        how,
        rank.compiled,
        dry_done - start,
        end - dry_done - rank.load_s,
        rank.load_s,
    )
    # Ranks that were done first wait here, and not in a collective of the GPU.
    group.barrier()


def _restored(client: ServiceClient) -> list[TargetKernels]:
    try:
        answer = client.restore()
    except ServiceGoneError as error:
        logger.warning("warmstart: the marker cannot be read: %s", error)
        return []
    for note in answer.notes:
        logger.warning("warmstart: %s", note)
    return [TargetKernels(each.target, each.kernels) for each in answer.targets]


def _all_agree(group: Any, mine: bool) -> bool:
    import torch

    if group.world_size == 1:
        return mine
    votes = torch.tensor([int(mine)])
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(votes.item())


def found_dry(rank: Rank, model_runner: Any) -> list[Any]:
    """The targets that one DECODE and one EXTEND forward of the smallest legal batch call, without calling them."""
    import torch

    failure: Exception | None = None
    agreed = True
    rank.start_dry()
    for each in forward_modes_of(model_runner):
        try:
            with torch.inference_mode():
                model_runner._dummy_run(batch_size=smallest_batch(model_runner), forward_mode_override=each)
            torch.get_device_module(model_runner.device).synchronize()
        except Exception as error:
            failure = error
        # After each: the others would wait at the beginning of the next one for a rank that has failed.
        agreed = _all_agree(model_runner.tp_group, failure is None)
        if not agreed:
            break
    targets = rank.end_dry()
    if not agreed:
        if rank.strict:
            raise RuntimeError("a dry forward failed on this or on another rank") from failure
        why = f"{type(failure).__name__}: {failure}" if failure else "on another rank"
        logger.warning("warmstart: a dry forward failed, targets are warmed when they are first called: %s", why)
    return targets


def smallest_batch(model_runner: Any) -> int:
    """The smallest batch that all ranks can split among them."""
    from sglang.srt.layers.dp_attention import get_attention_tp_size
    from sglang.srt.utils import require_gathered_buffer

    gathered = require_gathered_buffer(model_runner.server_args)
    return math.lcm(max(model_runner.attn_cp_size, 1), get_attention_tp_size() if gathered else 1)


def _steps() -> tuple[Step, ...]:
    process = _Process()

    def hooks(patch: Patch, compile_utils: ModuleType, entrypoint: ModuleType) -> None:
        install_hooks(patch, compile_utils, entrypoint, process)

    def discovery(patch: Patch, model_runner: ModuleType) -> None:
        install_discovery(patch, model_runner, process)

    return (
        Step((ENVIRON,), install_switch),
        Step((COMPILE_UTILS, ENTRYPOINT), hooks),
        Step((ENGINE,), install_service, required=False),
        Step((MODEL_RUNNER,), discovery, required=False),
    )


EXACT_WARMUP = Feature(
    name="exact-warmup",
    gains="each distinct DeepGEMM kernel is compiled once, all at the same time; a restart compiles none",
    hooks={
        f"{ENVIRON}.Envs.{COMPILER.name}": "the choice of the compiler, beside its neighbours",
        f"{ENGINE}.Engine._launch_scheduler_processes": "the process that starts the ranks starts the service, "
        "and they find it by their environment",
        f"{COMPILE_UTILS}.update_deep_gemm_config": "runs in each rank before it loads weights: it says hello, so that "
        "the service is ready when it asks",
        f"{COMPILE_UTILS}.{MAYBE_COMPILE}": "all wrapped GEMMs pass it, on every rank; replaced, not wrapped, since "
        "it is on the path of every call",
        f"{MODEL_RUNNER}.ModelRunner.kernel_warmup": "after memory is measured and before any forward: the dry "
        "forwards, and one batch for all targets",
    },
    upstream="none",
    drop_when="upstream compiles each distinct kernel once, in parallel, before it serves",
    built_in_as=(),
    steps=_steps(),
)
