"""SGLang's own model of one rank, with weights that have shapes and no data.

SGLang's ``ModelRunner`` reads the configuration and takes its decisions. It stops where it would load the model, and
the model is only built.
"""

from __future__ import annotations

import importlib.util
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from typing import Any

from sglang_warmstart.sglang.model_targets.refusal import RefusalError
from sglang_warmstart.sglang.seams import seam

Build = Callable[[Any], Any]

_OWN_LAYOUT = "this release gives a model that drafts a layout of its own"


class Start:
    """The start of a rank, as in SGLang 0.5.12.

    Args:
        server_args: SGLang's.
        tp_rank, pp_rank: which rank.
        build: makes the model of a runner that is ready to load one.

    Source: ``managers/scheduler.py`` and ``managers/tp_worker.py`` of SGLang.
    """

    def __init__(self, server_args: Any, tp_rank: int, pp_rank: int, build: Build) -> None:
        self.server_args, self.tp_rank, self.pp_rank, self.build = server_args, tp_rank, pp_rank, build
        self.arguments = seam().decided(server_args)

    def runner(self) -> Any:
        """The model runner of the rank, which has its model."""
        from sglang.srt.configs.model_config import ModelConfig

        self.begin()
        config = ModelConfig.from_server_args(self.server_args)
        self.set_groups(config)
        self.choose_libraries(config)
        return self.run(config, self.pp_rank, is_draft=False)

    def draft_runner(self) -> Any | None:
        """The runner of the model that drafts, if there is one. After that of the model that verifies."""
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        path = self.arguments["speculative_draft_model_path"]
        algorithm = SpeculativeAlgorithm.from_string(self.arguments["speculative_algorithm"])
        if not algorithm.is_speculative() or algorithm.is_ngram() or not path:
            return None
        config = ModelConfig.from_server_args(
            self.server_args,
            model_path=path,
            model_revision=self.arguments["speculative_draft_model_revision"],
            is_draft_model=True,
        )
        with self.drafting(algorithm):
            return self.run(config, 0, is_draft=True)

    def begin(self) -> None:
        """What the process of a rank does first."""

    def set_groups(self, config: Any) -> None:
        """Make the groups of ranks: here the model runner does."""

    def choose_libraries(self, config: Any) -> None:
        """Choose what runs GEMMs and experts. The scheduler does it before it makes a runner."""
        from sglang.srt.managers.scheduler import Scheduler

        Scheduler.init_moe_gemm_config(types.SimpleNamespace(server_args=self.server_args, model_config=config))

    def drafting(self, algorithm: Any) -> AbstractContextManager[Any]:
        """In which a model that drafts is made. Source: ``speculative/eagle_worker.py``."""
        from sglang.srt.layers.dp_attention import get_attention_tp_group
        from sglang.srt.layers.moe.utils import speculative_moe_a2a_backend_context, speculative_moe_backend_context

        within = ExitStack()
        if self.arguments["enable_dp_attention"] and algorithm.is_eagle3():
            from sglang.srt.speculative.spec_utils import draft_tp_context

            within.enter_context(draft_tp_context(get_attention_tp_group()))
        within.enter_context(speculative_moe_backend_context())
        within.enter_context(speculative_moe_a2a_backend_context())
        return within

    def run(self, config: Any, pp_rank: int, *, is_draft: bool) -> Any:
        """A runner that has the model of a configuration."""
        return building(self.build)(
            model_config=config,
            mem_fraction_static=self.arguments["mem_fraction_static"],
            gpu_id=0,
            nccl_port=0,
            server_args=self.server_args,
            is_draft_worker=is_draft,
            **self.place(pp_rank),
        )

    def place(self, pp_rank: int) -> dict[str, Any]:
        """What a runner is told of its rank's place in the server."""
        from sglang.srt.entrypoints.engine import _compute_parallelism_ranks

        attn_cp_rank, moe_dp_rank, moe_ep_rank = _compute_parallelism_ranks(self.server_args, self.tp_rank)
        return {
            "tp_rank": self.tp_rank,
            "tp_size": self.server_args.tp_size,
            "moe_ep_rank": moe_ep_rank,
            "moe_ep_size": self.server_args.ep_size,
            "pp_rank": pp_rank,
            "pp_size": self.server_args.pp_size,
            "dp_rank": 0 if self.server_args.enable_dp_attention else None,
            "attn_cp_rank": attn_cp_rank,
            "moe_dp_rank": moe_dp_rank,
        }


class PlacedStart(Start):
    """The start of a rank, as in SGLang 0.5.17: its arguments are published, and its place is one value.

    Source: ``Scheduler.__init__`` and ``run_scheduler_process`` in ``managers/scheduler.py``.
    """

    def begin(self) -> None:
        from sglang.srt.runtime_context import publish

        publish(self.server_args, role="scheduler")

    def drafting(self, algorithm: Any) -> AbstractContextManager[Any]:
        raise NotImplementedError(_OWN_LAYOUT)

    def place(self, pp_rank: int) -> dict[str, Any]:
        from sglang.srt.distributed.parallel_state_wrapper import ParallelState
        from sglang.srt.layers.dp_attention import compute_dp_attention_world_info

        sizes = {name: self.arguments[name] for name in ("dp_size", "attn_cp_size", "moe_dp_size", "dcp_size")}
        attention = compute_dp_attention_world_info(
            self.arguments["enable_dp_attention"],
            self.tp_rank,
            self.arguments["tp_size"],
            sizes["dp_size"],
            sizes["attn_cp_size"],
        )
        names = ("attn_tp_rank", "attn_tp_size", "attn_dp_rank", "attn_dp_size")
        known = super().place(pp_rank) | sizes | dict(zip(names, attention, strict=True)) | {"gpu_id": 0}
        known |= {"attn_dcp_rank": self.tp_rank % sizes["dcp_size"], "attn_dcp_size": sizes["dcp_size"]}
        # Which of these there are depends on the release.
        return {"ps": ParallelState(**{field.name: known[field.name] for field in fields(ParallelState)})}


class PublishedStart(Start):
    """The start of a rank, as in SGLang 0.5.23: its arguments and its place are published to the whole process."""

    def begin(self) -> None:
        from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

        rank = spawn_world_rank(self.server_args, tp_rank=self.tp_rank, pp_rank=self.pp_rank)
        publish(self.server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=0, gpu_id=0))

    def set_groups(self, config: Any) -> None:
        from sglang.srt.distributed import bootstrap

        bootstrap.init_parallel_runtime(server_args=self.server_args, device="cuda", dist_port=0)
        bootstrap.init_layer_runtime(model_config=config)

    def drafting(self, algorithm: Any) -> AbstractContextManager[Any]:
        raise NotImplementedError(_OWN_LAYOUT)

    def place(self, pp_rank: int) -> dict[str, Any]:
        return {}


def start_of(server_args: Any, tp_rank: int, pp_rank: int, build: Build) -> Start:
    """The start of a rank in the installed SGLang.

    Raises:
        RefusalError: it starts its ranks in another way.
    """
    import sglang
    from sglang.srt.model_executor.model_runner import ModelRunner

    parameters = inspect.signature(ModelRunner.__init__).parameters
    if "tp_rank" in parameters:
        return Start(server_args, tp_rank, pp_rank, build)
    if "ps" in parameters:
        return PlacedStart(server_args, tp_rank, pp_rank, build)
    if importlib.util.find_spec("sglang.srt.distributed.bootstrap") is not None:
        return PublishedStart(server_args, tp_rank, pp_rank, build)
    raise RefusalError(
        f"SGLang {sglang.__version__} starts its ranks as no release that is known here: record the plan on a GPU"
    )


def building(build: Build) -> type:
    """SGLang's model runner, which builds its model, does not load it, and does nothing that would follow."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    class Building(ModelRunner):  # type: ignore[misc]
        def initialize(self, *_: Any, **__: Any) -> None:
            if not self.is_draft_worker:
                set_expert_location(self)
            self.model = build(self)

    return Building


def set_expert_location(runner: Any) -> None:
    """Which experts are where: SGLang decides it before it builds the model."""
    if hasattr(runner, "maybe_init_expert_location_metadata"):
        runner.maybe_init_expert_location_metadata()
        return
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
