"""Exact warm-up: each distinct kernel is compiled once, all of them in parallel, and a restart compiles none.

SGLang's warm-up runs a GEMM for every M, or for a sample, and compiles one kernel after another. Here one service per
node asks DeepGEMM itself which kernels it would compile (:mod:`sglang_warmstart.deepgemm`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import one_line, passing
from sglang_warmstart.base.events import timed
from sglang_warmstart.base.gpus import capabilities
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import (
    JIT_MONITOR,
    PLANS,
    RESTORING,
    SERVICE,
    WARMSTART,
)
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.ledger import Ledger
from sglang_warmstart.deepgemm.marker import Launch, TargetKernels
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.launch import early_service, start_service
from sglang_warmstart.sglang.exact_warmup.introduction import hello_of
from sglang_warmstart.sglang.exact_warmup.launch import launch_of
from sglang_warmstart.sglang.exact_warmup.rank import START_WAIT_S, Key, Rank, WarmupError
from sglang_warmstart.sglang.exact_warmup.unreached import unreached
from sglang_warmstart.sglang.forward_modes import DUMMY_RUN, takes_forward_mode
from sglang_warmstart.sglang.hc_prenorm import other_buckets
from sglang_warmstart.sglang.m_list import fast_m_list, full_m_list
from sglang_warmstart.sglang.pp_parallel_warmup import forward_modes_of
from sglang_warmstart.sglang.seams import seam
from sglang_warmstart.sglang.votes import Votes

_HOPPER = 9  # the major number of its compute capability

# How a rank stands when all of them decide whether to run dry forwards; the least of all counts.
_NO_SERVICE, _NO_MARKER, _KNOWN = range(3)
# What has become of a dry forward on a rank; and where one of them does not say it.
_UNKNOWN, _FAILED, _WENT_WELL = range(3)

_FORWARD_FAILED = "warmstart: a dry forward failed, targets are warmed when they are first called"

# (matter, what this rank says): the least that any rank says.
Agree = Callable[[str, int], int]

logger = logging.getLogger(LOGGER_NAME)


class ExactWarmup:
    """Exact warm-up in this process, which may become a rank.

    Args:
        compile_utils: SGLang's DeepGEMM warm-up.
        direct: a GEMM as the library exports it, if somebody has put another one in its place (see ``Door``).
    """

    def __init__(
        self,
        compile_utils: ModuleType,
        direct: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda _, function: function,
    ) -> None:
        self.rank: Rank | None = None
        self._compile_utils, self._direct = compile_utils, direct
        self._is_wanted = False  # whether SGLang warms DeepGEMM here; ranks answer alike where their settings are
        self._get_num_sms: Callable[[], int] | None = None  # DeepGEMM's, once there is a rank
        self.ledger: Ledger[Key] = Ledger()
        self._chunk = 0
        self._sweep_all: Callable[..., None] | None = None
        self._is_restored = False  # the marker has been asked for
        self._sweeps_until: float | None = None
        self._votes = Votes("exact-warmup")
        self._starts = 0  # model runners that were warmed

    def around(
        self,
        original: Callable[..., None],
        guard: Callable[[Callable[..., None], Callable[..., None]], Callable[..., None]] = functools.partial,
    ) -> Callable[..., bool]:
        """What takes the place of ``original``: SGLang's decision whether to warm a GEMM before it is called.

        Args:
            guard: guards what is done about a new GEMM (``Hooks.guarded``); a known one is not worth it.

        Returns:
            A function of (kernel type, n, k, num_groups). It returns True: all that was to be done is done.
        """
        done = self.ledger.done
        self._sweep_all = original

        def meet_new(_: Callable[..., None], kernel_type: Any, n: int, k: int, num_groups: int) -> None:
            assert self._get_num_sms is not None
            key = (kernel_type, n, k, num_groups, self._get_num_sms())
            try:
                self._meet(key)
            except Exception:
                done.add(key)  # it is SGLang's from now on
                raise

        meet = guard(meet_new, original)

        @functools.wraps(original)
        def maybe_compile(kernel_type: Any, n: int, k: int, num_groups: int) -> bool:
            # On the path of every GEMM: nothing but the number of SMs, which is in the key, and a look into a set.
            get_num_sms = self._get_num_sms
            if get_num_sms is None:
                original(kernel_type, n, k, num_groups)
                return True
            key = (kernel_type, n, k, num_groups, get_num_sms())
            if key not in done:
                meet(kernel_type, n, k, num_groups)
            return True

        return maybe_compile

    def _meet(self, key: Key) -> None:
        import torch

        assert self.rank is not None
        # A kernel that is captured cannot be warmed in passing: DeepGEMM loads it, as it would.
        if not torch.cuda.is_current_stream_capturing():
            self.rank.meet(key)

    def bounded(self, executor: Any) -> Any:
        """An executor of SGLang's own warm-up that ends it when the time of the forward is over."""
        return executor if self._sweeps_until is None else _Bounded(executor, self._sweeps_until)

    def _sweep(self, kernel_type: Any, n: int, k: int, num_groups: int, fast: bool, limit_s: float) -> None:
        self._sweeps_until = time.perf_counter() + limit_s
        try:
            self._sweep_by_sglang(kernel_type, n, k, num_groups, fast)
        except _NoTimeLeftError:
            logger.warning(
                "warmstart: <%s> N=%d K=%d: SGLang's own warm-up ends after %.0f s, since other ranks wait in this "
                "forward: the Ms that it did not reach compile when they are used",
                *(kernel_type.name, n, k, limit_s),
            )
        finally:
            self._sweeps_until = None

    def _sweep_by_sglang(self, kernel_type: Any, n: int, k: int, num_groups: int, fast: bool) -> None:
        utils = self._compile_utils
        with passing():
            if not fast:
                assert self._sweep_all is not None
                self._sweep_all(kernel_type, n, k, num_groups)
            elif utils._DO_COMPILE_ALL:
                utils._compile_deep_gemm_one_type_all(kernel_type, n, k, num_groups, fast_m_list(self._chunk))

    def connect(self, server_args: Any, chunked_prefill_size: int | None = None) -> None:
        """Make this process a rank, if it can be one. It is said why not, and SGLang starts and warms as it does.

        Args:
            server_args: the server's arguments.
            chunked_prefill_size: tokens in a prefill chunk, where the arguments do not say.

        Raises:
            RuntimeError: it cannot, and strict mode is on.
        """
        if self.rank is not None or not self._compile_utils.ENABLE_JIT_DEEPGEMM or not is_wanted():
            return
        from sglang.srt.environ import envs

        self._is_wanted = True
        with suppress(Exception):  # whatever torch is like: without, this rank runs no dry forward with others
            self._votes.join()
        self._chunk = server_args.chunked_prefill_size if chunked_prefill_size is None else chunked_prefill_size
        strict = bool(envs.SGLANG_WARMSTART_STRICT.get())
        try:
            self.rank = self._connected_rank(launch_of(server_args, _world_rank(), os.environ), strict)
        except Exception as error:
            # Whatever a fork looks like.
            if strict:
                raise
            _refuse(f"{type(error).__name__}: {error}", strict)
        if self.rank is not None:
            self._get_num_sms = self.rank.library.get_num_sms

    def warm(self, model_runner: Any, runner: Any = None) -> None:
        """Before anything else runs a forward, load what the marker knows, or find the targets and warm them at once.

        Where no dry forward can run, the marker is all there is. What it does not know is warmed when it is first
        called, and known the next time.

        Args:
            runner: what has the dummy forward; None: the model runner itself.
        """
        runner = model_runner if runner is None else runner
        if not self._is_wanted or model_runner.device != "cuda":
            return
        ranks = seam().tp_group(model_runner).ranks
        self._starts += 1
        matters = f"runner {self._starts}"

        def agree(matter: str, mine: int) -> int:
            return self._votes.least(ranks, f"{matters}, {matter}", mine, absent=0)

        try:
            self._warm(model_runner, runner, agree)
        except BaseException:
            with suppress(Exception):  # they find out by their bound
                self._votes.leave(ranks)
            raise

    def _warm(self, model_runner: Any, runner: Any, agree: Agree) -> None:
        first, self._is_restored = not self._is_restored, True
        start = time.perf_counter()
        restored, known = _restored(self.rank) if self.rank is not None and first else (set(), False)
        if not may_run_dry(model_runner, runner):
            if self.rank is not None and restored:
                if not known:  # here nobody searches: what an earlier start has met is what there is
                    self.rank.warm([], START_WAIT_S, searched=True)
                _say_warm(self.rank, f"{len(restored)} targets restored from the marker", start, start)
            return
        # A dry forward holds collectives: all ranks run it, or none.
        stand = _NO_SERVICE if self.rank is None else _KNOWN if known else _NO_MARKER
        least = agree("stand", stand)
        if self.rank is None:
            return
        if least == _NO_SERVICE:
            logger.warning("warmstart: not all ranks take part: targets are warmed when they are first called")
        elif least == _KNOWN:
            _say_warm(self.rank, f"{len(restored)} targets restored from the marker", start, start)
        else:
            warm_found(self.rank, model_runner, runner, restored if known else None, agree)
        if least != _NO_SERVICE:
            # Ranks that were done first wait here, and not in a collective of the GPU.
            agree("done", 1)

    def warm_runner(self, runner: Any) -> None:
        """As ``warm``, for what has the dummy forward of a model runner."""
        self.warm(runner.model_runner, runner)

    def forget(self) -> None:
        """As in a process that has just been started."""
        self.rank, self._get_num_sms, self._is_wanted, self._is_restored = None, None, False, False
        self.ledger.clear()

    def _connected_rank(self, launch: Launch, strict: bool) -> Rank | None:
        from sglang.srt.environ import envs
        from sglang.srt.layers.deep_gemm_wrapper import entrypoint

        compile_utils = self._compile_utils
        library = compile_utils.deep_gemm
        path = os.environ.get(SERVICE)
        if path is None:
            _refuse("no service was started with this server", strict)
            return None
        hello, complaints = hello_of(os.environ, Path(library.__file__).parent, _gpu(), launch)
        for complaint in complaints:
            logger.warning("warmstart: %s", complaint)
        try:
            client = ServiceClient(Path(path))
            welcome = client.hello(hello)
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
        os.environ["DG_JIT_CACHE_DIR"] = hello.cache
        if envs.SGLANG_JIT_DEEPGEMM_FAST_WARMUP.get():
            logger.info("warmstart: exact warm-up replaces FAST_WARMUP: it covers every M and costs less")
        return Rank(
            client=client,
            library=library,
            entrypoint=entrypoint,
            direct=self._direct,
            m_max=full_m_list(self._chunk)[-1],
            strict=strict,
            free_bytes=_free_bytes,
            kernel_types=compile_utils.DeepGemmKernelType.__members__,
            ledger=self.ledger,
            sweep=self._sweep,
            outside_symmetric_memory=outside,
            refuses=_is_refusing,
            only_plans=welcome.only_plans,
            siblings=other_buckets,
        )


class _NoTimeLeftError(Exception):
    """SGLang's own warm-up of a GEMM has taken all the time that its forward had."""


class _Bounded:
    """An executor of SGLang's warm-up, with a call for each M, until a moment of ``time.perf_counter``."""

    def __init__(self, executor: Any, until: float) -> None:
        self._executor, self._until = executor, until

    def execute(self, m: int) -> None:
        if time.perf_counter() >= self._until:
            raise _NoTimeLeftError
        self._executor.execute(m=m)


def is_wanted() -> bool:
    """Whether the switches leave it on, and DeepGEMM's warm-up as a whole."""
    from sglang.srt.environ import envs

    return bool(
        WARMSTART.value(os.environ)
        and envs.SGLANG_ENABLE_JIT_DEEPGEMM.get()
        and envs.SGLANG_JIT_DEEPGEMM_PRECOMPILE.get()
    )


def start_node_service(server_args: Any) -> None:
    """Start the service beside the ranks, which find it by their environment. It ends with this process.

    One that `sglang-warmstart run` has started for this process is taken, unless it was started without knowing what it
    has to: where kernels are restored, or plans are recorded.
    """
    early = early_service(os.environ)
    on_gpu = seam().decided(server_args)["device"] == "cuda"
    if on_gpu and is_wanted() and importlib.util.find_spec("deep_gemm") is not None and not _all_are_too_old():
        os.environ.pop(SERVICE, None)
        try:
            restoring, plans = (Path(os.environ[name]) if name in os.environ else None for name in (RESTORING, PLANS))
            if early is not None and (restoring or plans):
                early.stop()
                early = None
            service = early or start_service(restoring=restoring, plans=plans)
            os.environ[SERVICE] = str(service.socket)
        except Exception as error:
            # Whatever it is, the server starts without.
            logger.warning("warmstart: no service for exact warm-up: %s", error)
    elif early is not None:
        del os.environ[SERVICE]
        early.stop()


def _all_are_too_old() -> bool:
    """Whether no GPU of this machine is of Hopper's age or younger, as DeepGEMM's JIT asks for."""
    found = capabilities()
    return bool(found) and all(major < _HOPPER for major, _ in found)


def _refuse(reason: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(f"exact warm-up is not possible: {reason}")
    logger.warning("warmstart: no exact warm-up, SGLang warms DeepGEMM in its own way: %s", reason)


def _is_refusing() -> bool:
    if JIT_MONITOR.value(os.environ) != "error":
        return False
    from sglang_warmstart.libraries.monitor import is_refusing

    return is_refusing()


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


def _world_rank() -> int:
    from sglang.srt.distributed.parallel_state import get_world_group

    rank: int = get_world_group().rank
    return rank


def may_run_dry(model_runner: Any, runner: Any) -> bool:
    """Whether dry forwards can run. It follows from arguments that all ranks share.

    A speculative algorithm's dummy forward verifies a draft, whatever mode it is told; a draft has none.
    """
    return (
        not model_runner.is_draft_worker
        and not model_runner.spec_algorithm.is_speculative()
        and takes_forward_mode(getattr(runner, DUMMY_RUN, None))
    )


def _restored(rank: Rank) -> tuple[set[Target], bool]:
    """The targets of the marker, whose kernels are loaded, and whether those are all that this launch has."""
    try:
        answer = rank.client.restore()
    except ServiceGoneError as error:
        logger.warning("warmstart: the marker cannot be read: %s", error)
        return set(), False
    for note in answer.notes:
        logger.warning("warmstart: %s", note)
    rank.load([TargetKernels(each.target, each.kernels) for each in answer.targets])
    return {each.target for each in answer.targets}, answer.known


def warm_found(rank: Rank, model_runner: Any, runner: Any, known: Collection[Target] | None, agree: Agree) -> None:
    """Run dry forwards, and warm the targets that they find.

    Args:
        known: targets whose kernels are loaded, and which are all of this launch's for what its marker says; None where
            none says that.
        agree: see :func:`found_dry`.
    """
    start = time.perf_counter()
    with timed("discover", "dry forwards", library="deep-gemm") as details:
        targets, complete = found_dry(rank, model_runner, runner, agree)
        targets += unreached(targets, model_runner, rank.library)
        details["kernels"] = len(targets)
    dry_done = time.perf_counter()
    missing = [target for target in targets if target not in (known or ())]
    # Asked for none, the service notes that this launch has none. A forward that failed has not shown that.
    if missing or (known is None and complete):
        rank.warm(missing, START_WAIT_S, searched=complete)
    _say_warm(rank, f"{len(targets)} targets found by dry forwards", start, dry_done)


def _say_warm(rank: Rank, what: str, start: float, dry_done: float) -> None:
    logger.info(
        "warmstart: exact warm-up: %s, %d kernels compiled on this node: dry forwards %.2f s, wait %.2f s, load %.3f s",
        what,
        rank.compiled,
        dry_done - start,
        max(time.perf_counter() - dry_done - rank.load_s, 0.0),
        rank.load_s,
    )


def found_dry(rank: Rank, model_runner: Any, runner: Any, agree: Agree) -> tuple[list[Target], bool]:
    """The targets that one DECODE and one EXTEND forward of the smallest legal batch call, without calling them.

    An EXTEND forward runs once for each layout of the experts' tokens that a server may use.

    Args:
        agree: the least of what the ranks say in a matter; 0 where not all of them say anything.

    Returns:
        The targets, and whether all forwards went well on all ranks.

    Raises:
        WarmupError: one failed here, and the others wait in its collectives for good.
    """
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch

    failure: Exception | None = None
    end = _WENT_WELL
    rank.start_dry()
    for number, (mode, layout) in enumerate(_forwards(model_runner)):
        try:
            with _as_serving(model_runner), layout:
                seam().dummy_forward(runner, seam().smallest_batch(model_runner), mode)
        except Exception as error:
            failure = error
            logger.warning("%s: %s", _FORWARD_FAILED, one_line(error))
        # After each: the others would wait at the beginning of the next one for a rank that has failed.
        end = agree(f"forward {number}", _WENT_WELL if failure is None else _FAILED)
        if end != _WENT_WELL:
            break
    targets = rank.end_dry()
    set_is_extend_in_batch(False)  # as it was before a forward that extends
    if end == _UNKNOWN and failure is not None:
        raise WarmupError(
            "a dry forward failed on this rank, and the others do not come out of it: "
            "SGLANG_JIT_DEEPGEMM_PRECOMPILE=0 starts without"
        ) from failure
    if end != _WENT_WELL:
        if rank.strict:
            raise RuntimeError("a dry forward failed on this or on another rank") from failure
        if failure is None:
            logger.warning("%s: on another rank", _FORWARD_FAILED)
    return targets, end == _WENT_WELL


@contextmanager
def _as_serving(model_runner: Any) -> Iterator[None]:
    """How a forward runs that is not to leave a trace.

    Under no_grad: the event loops of disaggregated serving write to buffers that were made under it, and could not if
    they were made in inference mode. On the stream that FlashInfer's autotune uses: on the default stream NCCL 2.29
    cannot copy batches where memory is symmetric.
    """
    import torch

    device = torch.get_device_module(model_runner.device)
    stream = model_runner.forward_stream
    stream.wait_stream(device.current_stream())
    with torch.no_grad(), device.stream(stream):
        yield
    device.current_stream().wait_stream(stream)
    device.synchronize()


def _forwards(model_runner: Any) -> Iterator[tuple[Any, AbstractContextManager[object]]]:
    """The mode of each dry forward, and its layout. Decoding has the first: it is that of CUDA graphs."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    for mode in forward_modes_of(model_runner):
        layouts = seam().layouts()
        for layout in layouts if mode == ForwardMode.EXTEND else layouts[:1]:
            yield mode, layout
