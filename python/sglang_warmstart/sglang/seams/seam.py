"""What every seam answers (see :mod:`sglang_warmstart.sglang.seams`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.source_edit import Edit
from sglang_warmstart.sglang.seams.source import defines

MODEL_RUNNER = "sglang.srt.model_executor.model_runner"

# (module, class, method) of a step of a rank's start-up -> what it is called.
Steps = Mapping[tuple[str, str, str], str]

# Does its work for a model runner; the second is what has the release's dummy forward.
BeforeForwards = Callable[[Any, Any], None]

# Expert-parallel backends choose the kernels of a prefill by this; without an override nothing changes.
EXTEND_EDIT = Edit(
    "            set_is_extend_in_batch(False)\n",
    "            set_is_extend_in_batch(forward_mode_override == ForwardMode.EXTEND)\n",
)


class Seam(ABC):
    """A family of releases.

    Attributes:
        releases: for people, such as "0.5.14 to 0.5.18".
        marks: "module:name" of what tells the family from older ones.
        warm_up_module: where the warm-up of kernels is; it owns the dummy forward too.
        dummy_run: the full name of the dummy forward.
        warm_up: the full names of what ``hook_warm_up`` hooks; a release has one or two of them.
        dummy_run_edits: what ``_dummy_run`` lacks to run an extend forward as a prefill does.
        dummy_run_parameters: what ``_dummy_run`` takes; optional ones may follow.
        forwards: (module, class, method) of what runs one forward or captures one graph; a release has most of them.
        steps: (module, class, method) of the steps of a rank's start-up, and what each is called.
    """

    releases: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()
    warm_up_module: ClassVar[str]
    dummy_run: ClassVar[str]
    warm_up: ClassVar[tuple[str, ...]]
    dummy_run_edits: ClassVar[tuple[Edit, ...]] = (EXTEND_EDIT,)
    dummy_run_parameters: ClassVar[str] = "self, batch_size, run_ctx"
    forwards: ClassVar[tuple[tuple[str, str, str], ...]]
    steps: ClassVar[Steps]

    def fits(self, sglang_root: Path) -> bool:
        """Whether a source tree has all marks of the family."""
        return all(defines(sglang_root, mark) for mark in self.marks)

    # The warm-up of kernels

    @abstractmethod
    def hook_warm_up(self, hooks: Hooks, module: ModuleType, do: BeforeForwards) -> None:
        """Have ``do(model_runner, runner)`` called once for each model runner on a GPU.

        That is after memory has been measured and before anything runs a forward: FlashInfer's autotuning is the first.

        Raises:
            StandsAsideError: the place is not there.
        """

    def dummy_runner(self, module: ModuleType) -> type:
        """The class that has the dummy forward.

        Raises:
            StandsAsideError: it is not there.
        """
        return class_of(module, self.dummy_run.split(".")[-2])

    def layouts(self) -> Sequence[AbstractContextManager[object]]:
        """What decides how experts lay out their tokens, each as a context for a forward. A server may use them all."""
        return (nullcontext(),)

    def dummy_forward(self, runner: Any, batch_size: int, mode: Any) -> None:
        """Run a forward of one token for each request, with SGLang's own dummy batch.

        Args:
            mode: SGLang's ``ForwardMode``.
        """
        runner._dummy_run(batch_size=batch_size, forward_mode_override=mode)

    # Arguments

    def decided(self, server_args: Any) -> Mapping[str, Any]:
        """The server's arguments by name, with the values that SGLang has decided on."""
        found: Mapping[str, Any] = vars(server_args)
        return found

    def server_arguments(self, given: Any = None) -> Any:
        """SGLang's record of the server's arguments.

        Args:
            given: what a hooked function was handed, if it was.
        """
        return given

    def chunked_prefill_size(self, compile_utils: ModuleType, given: Any = None) -> int:
        """Tokens in a prefill chunk, when DeepGEMM's warm-up is configured.

        Args:
            compile_utils: SGLang's DeepGEMM warm-up.
            given: the server's arguments that it was handed, if it was.
        """
        size: int = given.chunked_prefill_size
        return size

    # Parallel state

    def tp_group(self, model_runner: Any) -> Any:
        """SGLang's coordinator of the ranks that share a layer."""
        return model_runner.tp_group

    def disaggregation_mode(self, model_runner: Any) -> str:
        """ "null", "prefill" or "decode"."""
        mode: str = model_runner.server_args.disaggregation_mode
        return mode

    @abstractmethod
    def cp_alignment(self, model_runner: Any) -> int:
        """Context-parallel ranks of attention: what a batch is to be a multiple of."""

    @abstractmethod
    def gathered_tp_size(self, model_runner: Any) -> int:
        """Attention TP ranks where the forward gathers its tokens from them, else 1."""

    def smallest_batch(self, model_runner: Any) -> int:
        """The smallest batch that all ranks can split among them."""
        return math.lcm(max(self.cp_alignment(model_runner), 1), max(self.gathered_tp_size(model_runner), 1))
