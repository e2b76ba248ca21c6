"""SGLang's own model of one rank, with weights that have shapes and no data.

SGLang's ``ModelRunner`` makes the groups, reads the configuration and takes its decisions. It stops where it would
load the model, and the model is only built.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from sglang_warmstart.sglang.model_targets.refusal import RefusalError


def runner_of(server_args: Any, tp_rank: int, pp_rank: int, build: Callable[[Any], Any]) -> Any:
    """The model runner of a rank, which has its model.

    Args:
        server_args: SGLang's.
        build: makes the model of a runner that is ready to load one.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.scheduler import Scheduler

    config = ModelConfig.from_server_args(server_args)
    # Which libraries run GEMMs and experts is decided by the scheduler, before it makes a runner.
    Scheduler.init_moe_gemm_config(types.SimpleNamespace(server_args=server_args, model_config=config))
    return _runner(server_args, config, tp_rank, pp_rank, build, is_draft=False)


def draft_runner_of(server_args: Any, tp_rank: int, build: Callable[[Any], Any]) -> Any | None:
    """The runner of the model that drafts, if there is one. After that of the model that verifies.

    Source: ``speculative/eagle_worker.py`` of SGLang 0.5.12.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import get_attention_tp_group
    from sglang.srt.layers.moe.utils import speculative_moe_a2a_backend_context, speculative_moe_backend_context
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    algorithm = SpeculativeAlgorithm.from_string(server_args.speculative_algorithm)
    if not algorithm.is_speculative() or algorithm.is_ngram() or not server_args.speculative_draft_model_path:
        return None
    config = ModelConfig.from_server_args(
        server_args,
        model_path=server_args.speculative_draft_model_path,
        model_revision=server_args.speculative_draft_model_revision,
        is_draft_model=True,
    )
    with speculative_moe_backend_context(), speculative_moe_a2a_backend_context():
        if server_args.enable_dp_attention and algorithm.is_eagle3():
            from sglang.srt.speculative.spec_utils import draft_tp_context

            with draft_tp_context(get_attention_tp_group()):
                return _runner(server_args, config, tp_rank, 0, build, is_draft=True)
        return _runner(server_args, config, tp_rank, 0, build, is_draft=True)


def _runner(
    server_args: Any, config: Any, tp_rank: int, pp_rank: int, build: Callable[[Any], Any], *, is_draft: bool
) -> Any:
    import sglang
    from sglang.srt.entrypoints.engine import _compute_parallelism_ranks
    from sglang.srt.model_executor.model_runner import ModelRunner

    class Building(ModelRunner):  # type: ignore[misc]
        """Has a model that it has not loaded, and nothing that would follow."""

        def initialize(self, *_: Any, **__: Any) -> None:
            if not self.is_draft_worker:
                _set_expert_location(self)
            self.model = build(self)

    if "tp_rank" not in inspect.signature(ModelRunner.__init__).parameters:
        raise RefusalError(
            f"SGLang {sglang.__version__} builds its models otherwise than 0.5.12, in a way that is not known here: "
            "record the plan on a GPU"
        )
    attn_cp_rank, moe_dp_rank, moe_ep_rank = _compute_parallelism_ranks(server_args, tp_rank)
    return Building(
        model_config=config,
        mem_fraction_static=server_args.mem_fraction_static,
        gpu_id=0,
        tp_rank=tp_rank,
        tp_size=server_args.tp_size,
        moe_ep_rank=moe_ep_rank,
        moe_ep_size=server_args.ep_size,
        pp_rank=pp_rank,
        pp_size=server_args.pp_size,
        nccl_port=0,
        server_args=server_args,
        dp_rank=0 if server_args.enable_dp_attention else None,
        attn_cp_rank=attn_cp_rank,
        moe_dp_rank=moe_dp_rank,
        is_draft_worker=is_draft,
    )


def _set_expert_location(runner: Any) -> None:
    """Which experts are where: SGLang decides it before it builds the model."""
    from sglang.srt.eplb.expert_location import (
        compute_initial_expert_location_metadata,
        set_global_expert_location_metadata,
    )

    set_global_expert_location_metadata(
        compute_initial_expert_location_metadata(
            server_args=runner.server_args, model_config=runner.model_config, moe_ep_rank=runner.moe_ep_rank
        )
    )


def build_model(runner: Any) -> Any:
    """The model of a runner, before weights are loaded into it.

    Raises:
        RefusalError: SGLang has no class of its own for it here.
    """
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype

    config = runner.model_config
    kind, _ = get_model_architecture(config)
    wanted = list(config.hf_config.architectures)
    if kind.__name__.startswith("Transformers"):
        raise RefusalError(
            f"this SGLang has no class of its own for {', '.join(wanted)}, or it cannot be imported here"
        )
    load_config = LoadConfig(load_format="dummy", draft_model_idx=runner.draft_model_idx)
    quantisation = loader._get_quantization_config(config, load_config)
    with set_default_torch_dtype(config.dtype), torch.device("cuda"):
        return loader._initialize_model(config, load_config, quantisation)
