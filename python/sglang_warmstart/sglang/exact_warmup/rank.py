"""A rank of a server, as exact warm-up sees it: the targets that it has met, and their state.

The key of a target is that of SGLang's own warm-up, plus the number of SMs. Everything else that selects a kernel is
read from the first call with a new key.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import IntendedError, first_line
from sglang_warmstart.base.events import emit, now, timed
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.deepgemm.door import Door, OnCall, answer_with_zeros, check_names
from sglang_warmstart.deepgemm.gemms import GEMMS, Gemm, UnsupportedCallError
from sglang_warmstart.deepgemm.ledger import Ledger
from sglang_warmstart.deepgemm.load import load
from sglang_warmstart.deepgemm.marker import TargetKernels
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.protocol import Answer, Warmed

# For all waits inside one forward together, and 15 s more for a service that does not answer: well below the limits of
# DeepEP (100 s), NCCL and the watchdog. What is not ready then is left to SGLang's own warm-up.
FORWARD_WAIT_S = 45.0
# For the wait before the first forward, when no other rank waits in a collective.
START_WAIT_S = 900.0

# What would have covered a target that is met while serving.
_LATE_REMEDY = "no dry forward met it and no marker knew it; the marker does now, and the next start loads its kernels"

# Targets that a line names, where many are left for one reason.
_NAMED = 3

# Of the GPU's free memory, what the calls that load kernels may take.
_LOAD_SHARE = 0.8

logger = logging.getLogger(LOGGER_NAME)

# SGLang's key of a GEMM, and what else its kernel depends on: (kernel type, n, k, num_groups or num_splits, num_sms).
# The kernel type is SGLang's own member of an IntEnum, as its hook has it.
Key = tuple[Any, int, int, int, int]


class WarmupError(IntendedError, RuntimeError):
    """A target cannot be warmed, and strict mode is on; names it and says why."""


@dataclass
class Rank:
    """The targets of this process.

    Args:
        client: of the node's service.
        library: the module ``deep_gemm``.
        entrypoint: SGLang's wrapper, which has ``library`` under the name ``deep_gemm``.
        direct: a GEMM as the library made it (see ``Door``).
        m_max: the largest M that SGLang would sweep.
        strict: whether a target that cannot be warmed raises.
        free_bytes: of the GPU's memory.
        kernel_types: SGLang's members of them, by name.
        ledger: what has become of each GEMM.
        sweep: SGLang's own warm-up of (kernel type, n, k, num_groups), with True its fast list, for so many seconds.
        outside_symmetric_memory: SGLang's guard: an allocation inside would be a collective of all GPUs.
        refuses: whether a kernel that is not there is to be refused now, rather than compiled.
        only_plans: targets are recorded for a plan, and no GEMM of them ever runs: each writes zeros.
        siblings: the targets that a server needs too if it has one: they are warmed with it, all at once.
    """

    client: ServiceClient
    library: Any
    entrypoint: ModuleType
    direct: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    m_max: int
    strict: bool
    free_bytes: Callable[[], int]
    kernel_types: Mapping[str, Any]
    sweep: Callable[[Any, int, int, int, bool, float], None]
    outside_symmetric_memory: Callable[[], AbstractContextManager[None]]
    refuses: Callable[[], bool] = lambda: False
    only_plans: bool = False
    siblings: Callable[[Target], list[Target]] = lambda _: []
    ledger: Ledger[Key] = field(default_factory=Ledger)
    load_s: float = 0.0  # spent in loading so far
    compiled: int = 0  # kernels, by the service, so far
    _dry: dict[Target, None] | None = None  # the targets that were met, in order; None while calls are real
    _awaited: Key | None = None
    _wait_left_s: float = FORWARD_WAIT_S
    _postponed: int = 0  # calls in this forward that found no time

    def __post_init__(self) -> None:
        self._leave_the_door()

    def meet(self, key: Key) -> None:
        """A GEMM with a new key is about to be called: see to its kernels first. Not on the path of known keys."""
        if self._dry is not None:
            return
        if self._awaited is not None:
            unseen = self._awaited
            self._leave_the_door()
            self._leave([unseen], "it is called by another function than those that are known")
        if self.ledger.is_left(key):
            self._sweep_if_left(key)
        elif _name_of(key[0]) not in GEMMS:
            self._leave([key], "the installed DeepGEMM is not known to have such a GEMM")
            self._sweep_if_left(key)
        elif self.refuses():
            # What the cache has, DeepGEMM loads; before it compiles anything, the monitor's command refuses.
            self.ledger.done.add(key)
        elif self._wait_left_s <= 0:
            self._leave_to_the_next_forward(key)
        else:
            # The next call is the one that has this key, and it has all that selects a kernel.
            self._awaited = key
            self._stand_at_the_door(self._on_first_call)

    def begin_forward(self) -> None:
        """A forward begins, and with it the time that targets may take in it."""
        self._wait_left_s = FORWARD_WAIT_S
        self._postponed = 0

    def _leave_to_the_next_forward(self, key: Key) -> None:
        if self.strict:
            raise WarmupError(f"{_name(key)} cannot be warmed: no time is left in this forward")
        self._postponed += 1
        if self._postponed == 1:
            logger.warning(
                "warmstart: no time is left in this forward: %s and what else is new in it compile when they are used, "
                "and are warmed in the next one",
                _name(key),
            )

    def _sweep_if_left(self, key: Key) -> None:
        """Leave it to SGLang's own warm-up as long as this forward has time, and else to first use."""
        if self.ledger.is_left(key):
            self.ledger.done.add(key)
            start = now()
            try:
                if self._wait_left_s > 0:
                    self.sweep(*key[:4], self.ledger[key].no_context, self._wait_left_s)
                else:
                    logger.warning("warmstart: no time is left in this forward: %s compiles on first use", _name(key))
            finally:
                self._wait_left_s -= now() - start

    def start_dry(self) -> None:
        """From now on the wrapped GEMMs write zeros, and are noted."""
        self._dry = {}
        self._stand_at_the_door(self._answer_dry)

    def end_dry(self) -> list[Target]:
        """The GEMMs are DeepGEMM's again. Returns the targets that were noted."""
        found, self._dry = list(self._dry or ()), None
        self._leave_the_door()
        return found

    def _stand_at_the_door(self, on_call: OnCall) -> None:
        self.entrypoint.deep_gemm = Door(self.library, on_call, self.direct)  # type: ignore[attr-defined]

    def _leave_the_door(self) -> None:
        self._awaited = None
        if self.only_plans:
            self._stand_at_the_door(_answer_unseen)
        else:
            self.entrypoint.deep_gemm = self.library  # type: ignore[attr-defined]

    def _on_first_call(self, gemm: Gemm, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        key, awaited = self._key_of_call(gemm, arguments), self._awaited
        if self.only_plans:
            call = functools.partial(_answer_unseen, gemm, arguments, call)
        if awaited is None or key[:-1] != awaited[:-1]:
            return call()  # one that did not pass SGLang's hook
        self._leave_the_door()
        try:
            target = self._target_of_call(gemm, arguments)
        except UnsupportedCallError as error:
            self._leave([key], str(error))
        else:
            self._warm_late(target)
        self._sweep_if_left(key)
        # Both: between the hook and the call, SGLang may set another number of SMs.
        self.ledger.done.update((key, awaited))
        return call()

    def _warm_late(self, target: Target) -> None:
        """Warm a target whose first call is under way. A server that serves stalls meanwhile, and a monitor hears."""
        start, compiled = now(), self.compiled
        try:
            self.warm(self._with_siblings(target), self._wait_left_s)
        finally:
            seconds = now() - start
            self._wait_left_s -= seconds
        # What the service compiled for it has events of its own.
        details = {"library": "deep-gemm", "shape": str(target), "target": str(target), "kernels": 0}
        if self.compiled > compiled:
            emit("jit", "a new target", start, seconds, remedy=_LATE_REMEDY, **details)
        else:
            emit("load", "a new target", start, seconds, cached=True, **details)

    def _answer_dry(self, gemm: Gemm, arguments: dict[str, Any], call: Callable[[], Any]) -> None:
        answer_with_zeros(gemm, arguments)
        try:
            target = self._target_of_call(gemm, arguments)
        except UnsupportedCallError:
            return  # its first real call says so
        if self._dry is not None and target not in self._dry:
            new = self._with_siblings(target)
            self._dry |= dict.fromkeys(new)
            # The service works on it while this forward goes on. One that is gone is noticed when it is asked:
            # a forward that ends on this rank alone would leave the others in a collective.
            with suppress(ServiceGoneError):
                self.client.announce(new, self.free_bytes())

    def _with_siblings(self, target: Target) -> list[Target]:
        return [target, *(each for each in self.siblings(target) if self._key_of(each) not in self.ledger.done)]

    def _target_of_call(self, gemm: Gemm, arguments: dict[str, Any]) -> Target:
        check_names(gemm, arguments)
        alignment = self.library.get_mk_alignment_for_contiguous_layout()
        return gemm.target(arguments, self.library.get_num_sms(), self.m_max, alignment)

    def _key_of_call(self, gemm: Gemm, arguments: dict[str, Any]) -> Key:
        lhs, rhs = (each[0] if isinstance(each, tuple) else each for each in (arguments["a"], arguments["b"]))
        num_groups = rhs.shape[0] if rhs.dim() == 3 else 1
        if "num_splits" in gemm.parameters:
            num_groups = arguments.get("num_splits") or 0
        n, k, num_sms = rhs.shape[-2], lhs.shape[-1], self.library.get_num_sms()
        return (self._kernel_type(gemm.kernel_type), n, k, num_groups, num_sms)

    def _key_of(self, target: Target) -> Key:
        return (self._kernel_type(target.kernel_type), target.n, target.k, target.num_groups, target.num_sms)

    def _kernel_type(self, name: str) -> Any:
        # A marker may know of one that this SGLang does not have: nobody asks for it.
        return self.kernel_types.get(name, name)

    def warm(self, targets: list[Target], limit_s: float, searched: bool = False) -> None:
        """Have the kernels of targets compiled and load them. What cannot be had is left to SGLang, or raised.

        Args:
            searched: there are no other targets than these, and those that are known.

        Raises:
            WarmupError: strict mode is on, and a target could not be warmed.
        """
        try:
            with timed("step", "wait for kernels", kernels=len(targets)):
                answer = self.client.warm(targets, self.free_bytes(), limit_s, searched)
        except ServiceGoneError as error:
            answer = Answer(tuple(Warmed(target, error=str(error)) for target in targets))
        self.compiled = max(self.compiled, answer.compiled)
        for note in answer.notes:
            logger.warning("warmstart: %s", note)
        left: dict[tuple[str, bool], list[Key]] = {}
        for warmed in answer.targets:
            if warmed.error:
                left.setdefault((warmed.error, warmed.no_context), []).append(self._key_of(warmed.target))
        for (reason, fast), keys in left.items():
            self._leave(keys, reason, fast=fast)
        self.load([TargetKernels(each.target, each.kernels) for each in answer.targets if not each.error])

    def load(self, targets: list[TargetKernels]) -> None:
        """Load the kernels of targets into this process; from then on they are known.

        Raises:
            WarmupError: strict mode is on, and a call failed.
        """
        for each in targets:
            key = self._key_of(each.target)
            self.ledger.done.add(key)
            entry = self.ledger[key]
            entry.state, entry.kernels = "loaded", each
        if not targets or self.only_plans:
            return
        with timed("load", f"{len(targets)} targets", library="deep-gemm") as details, self.outside_symmetric_memory():
            loaded = load(targets, lambda: int(self.free_bytes() * _LOAD_SHARE))
            details["kernels"] = loaded.calls
        for target, error in loaded.failed:
            message = f"{target}: its kernels cannot be loaded: {first_line(error)}"
            if self.strict:
                raise WarmupError(message) from error
            logger.warning("warmstart: %s; they are loaded on first use", message)
        self.load_s += loaded.seconds
        for target, m, size in loaded.left_out:
            logger.warning(
                "warmstart: %s: M=%d and above are loaded on first use: they take %.1f GiB", target, m, size / (1 << 30)
            )
        logger.info("warmstart: %d targets loaded: %d kernels in %.3f s", len(targets), loaded.calls, loaded.seconds)

    def _leave(self, keys: Sequence[Key], reason: str, *, fast: bool = False) -> None:
        """Leave targets to SGLang, all of them for one reason, which is said once."""
        names = ", ".join(map(_name, keys[:_NAMED]))
        if len(keys) > _NAMED:
            names += f" and {len(keys) - _NAMED} more"
        if self.strict:
            raise WarmupError(f"{names} cannot be warmed: {reason}")
        are, them = ("is", "it") if len(keys) == 1 else ("are", "them")
        for key in keys:
            self.ledger.leave(key, reason, no_context=fast)
        if self.only_plans:
            logger.warning("warmstart: %s %s not in the plan: %s", names, are, reason)
            self.ledger.done.update(keys)
            with suppress(ServiceGoneError):
                for key in keys:
                    self.client.left_out(_name(key), reason)
            return
        way = "by its fast list of Ms" if fast else "in its own way"
        logger.warning("warmstart: %s %s left to SGLang, which warms %s %s: %s", names, are, them, way, reason)


def _answer_unseen(gemm: Gemm, arguments: dict[str, Any], _call: Callable[[], Any]) -> None:
    answer_with_zeros(gemm, arguments)


def _name(key: Key) -> str:
    kernel_type, n, k, num_groups, num_sms = key
    return f"<{_name_of(kernel_type)}> N={n} K={k} num_groups={num_groups} num_sms={num_sms}"


def _name_of(kernel_type: Any) -> str:
    return str(getattr(kernel_type, "name", kernel_type))
