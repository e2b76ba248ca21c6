"""A real ModelRunner on CPU in this process; `stages` runs one per pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kit.ports import free_ports
from kit.release import Release, installed_release

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

_MEM_FRACTION = 0.3


def make_runner(
    model_path: Path,
    pp_rank: int = 0,
    pp_size: int = 1,
    dist_port: int | None = None,
    server_args: Mapping[str, object] | None = None,
) -> ModelRunner:
    """The runner of one pipeline stage; the stages of one model need one `dist_port`. One runner a process.

    `server_args` are given to SGLang's ServerArgs on top of what a CPU needs.
    """
    release = installed_release()
    runner = _recipe(release)(
        _cpu_server_args(model_path, pp_size, server_args or {}),
        pp_rank,
        free_ports(1)[0] if dist_port is None else dist_port,
    )
    if release.since("0.5.14"):
        runner.alloc_memory_pool()
        runner.init_attention_backends()
    # The one method that the torch_native backend lacks for a dummy run: it has no CUDA graph to fill.
    runner.attn_backend.get_cuda_graph_seq_len_fill_value = lambda: 1
    if release.since("0.5.14"):
        runner.init_cuda_graphs()  # on CPU: makes `eager_runner`, which owns the dummy run, and no graph
    return runner


def dummy_run(runner: ModelRunner, batch_size: int) -> None:
    """SGLang's own dummy decode forward, at the place where the release has it."""
    import torch

    if not installed_release().since("0.5.14"):
        runner._dummy_run(batch_size=batch_size)
        return
    eager = runner.eager_runner
    with torch.inference_mode():
        eager._dummy_run(batch_size=batch_size, buffers=eager._alloc_dummy_decode_buffers(batch_size))


def _cpu_server_args(model_path: Path, pp_size: int, extra: Mapping[str, object]) -> ServerArgs:
    from sglang.srt.server_args import ServerArgs

    settings: dict[str, object] = {
        "model_path": str(model_path),
        "device": "cpu",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "max_total_tokens": 4096,
        "mem_fraction_static": _MEM_FRACTION,
        "pp_size": pp_size,
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        **installed_release().server_args,
        **extra,
    }
    return ServerArgs(**settings)


def _ranks_as_arguments(server_args: ServerArgs, pp_rank: int, dist_port: int) -> ModelRunner:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    return ModelRunner(
        model_config=ModelConfig.from_server_args(server_args),
        mem_fraction_static=_MEM_FRACTION,
        gpu_id=pp_rank,
        tp_rank=0,
        tp_size=1,
        moe_ep_rank=0,
        moe_ep_size=1,
        pp_rank=pp_rank,
        pp_size=server_args.pp_size,
        nccl_port=dist_port,
        server_args=server_args,
    )


def _ranks_in_one(server_args: ServerArgs, pp_rank: int, dist_port: int) -> ModelRunner:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_executor.model_runner import ModelRunner

    from_context = installed_release().since("0.5.19")
    if installed_release().since("0.5.17"):
        from sglang.srt.runtime_context import publish

        # What the scheduler process does before it makes its runner: publish the context that all layers read.
        publish(server_args, role="scheduler")
    initialize_moe_config(*([] if from_context else [server_args]))
    return ModelRunner(
        model_config=ModelConfig.from_server_args(server_args),
        mem_fraction_static=_MEM_FRACTION,
        gpu_id=pp_rank,
        ps=ParallelState.trivial(pp_rank=pp_rank, pp_size=server_args.pp_size, gpu_id=pp_rank),
        nccl_port=dist_port,
        server_args=server_args,
    )


def _ranks_in_the_context(server_args: ServerArgs, pp_rank: int, dist_port: int) -> ModelRunner:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

    server_args.resolve_once()
    world_rank = spawn_world_rank(server_args, tp_rank=0, pp_rank=pp_rank)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=pp_rank))
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=dist_port)
    bootstrap.init_layer_runtime(model_config=model_config)
    initialize_moe_config()
    return ModelRunner(
        model_config=model_config,
        mem_fraction_static=_MEM_FRACTION,
        gpu_id=pp_rank,
        nccl_port=dist_port,
        server_args=server_args,
    )


def _recipe(release: Release) -> Callable[[ServerArgs, int, int], ModelRunner]:
    """How a scheduler process of this release makes its runner."""
    if release.since("0.5.21"):
        return _ranks_in_the_context
    return _ranks_in_one if release.since("0.5.16") else _ranks_as_arguments
