"""The process that builds the model. It is started for one question, because torch and SGLang are not the same after.

It imports SGLang once, and forks for each rank that differs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from sglang_warmstart.base.errors import StandsAsideError, first_line, one_line
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.sglang.attn_tp_gather import ATTN_TP_GATHER
from sglang_warmstart.sglang.exact_warmup.introduction import PREFIXES
from sglang_warmstart.sglang.feature import Feature, find_built_in
from sglang_warmstart.sglang.hc_prenorm import MHC, other_buckets
from sglang_warmstart.sglang.m_list import full_m_list
from sglang_warmstart.sglang.mhc_prewarm import MHC_PREWARM
from sglang_warmstart.sglang.model_targets.protocol import Answer, Begun, NotFound, Question, Ranks, Refused
from sglang_warmstart.sglang.model_targets.recorder import Recorder
from sglang_warmstart.sglang.model_targets.refusal import RefusalError, where
from sglang_warmstart.sglang.seams import seam
from sglang_warmstart.sglang.seams.seam import MODEL_RUNNER

# No decision was seen to depend on it, as long as there are enough.
_GPUS_OF_A_NODE = 8


def main() -> None:
    """Read a question from standard input, and write the answer to a descriptor. Arguments: that, and who asks."""
    descriptor, parent = map(int, sys.argv[1:])
    end_with(parent)
    with os.fdopen(descriptor, "wb") as lines:
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)

        def work() -> None:
            say(lines, Begun("importing SGLang"))
            answer(question.arguments, prepared(question.gpu), lines)

        _refusing(lines, work)


def say(lines: IO[bytes], line: Answer) -> None:
    """Write a line, so that it is read at once."""
    lines.write(msgspec.json.encode(line) + b"\n")
    lines.flush()


def _refusing(lines: IO[bytes], work: Callable[[], None]) -> bool:
    """Do something, and say why if it cannot be done. Returns whether it was."""
    try:
        work()
    except RefusalError as error:
        say(lines, Refused(first_line(error)))
    except Exception as error:
        # Whatever it is, it is this model that is not understood. The log has the rest.
        traceback.print_exc()
        say(lines, Refused(f"the model cannot be built here: {where(error)}"))
    else:
        return True
    return False


@dataclass
class Prepared:
    """A process in which SGLang is imported and believes that it is on a GPU.

    Args:
        recorder: takes the place of DeepGEMM.
        on_gpu: while it is entered, tensors can be made there.
    """

    recorder: Recorder
    on_gpu: AbstractContextManager[Any]


def prepared(gpu: Gpu) -> Prepared:
    """Import SGLang on a GPU that is not there. It is not undone."""
    from sglang_warmstart.sglang.model_targets import missing, pretended_gpu

    missing.stand_in()
    recorder = Recorder(gpu)
    sys.modules |= recorder.modules()
    on_gpu = pretended_gpu.pretend(gpu, _GPUS_OF_A_NODE)
    missing.silence_kernels()
    for name in (MODEL_RUNNER, "sglang.srt.managers.scheduler", "sglang.srt.models.registry"):
        importlib.import_module(name)
    return Prepared(recorder, on_gpu)


def answer(arguments: Sequence[str], process: Prepared, lines: IO[bytes]) -> None:
    """Say the targets of each rank of a server.

    Raises:
        RefusalError: nothing can be said about this server.
    """
    server_args = _server_args(arguments)
    chunk, stages = seam().decided(server_args)["chunked_prefill_size"], seam().decided(server_args)["pp_size"]
    process.recorder.m_max = full_m_list(chunk)[-1]
    for stage in range(stages):
        say(lines, Begun("building the model" if stages == 1 else f"building stage {stage} of the model"))
        # SGLang keeps the place of a rank in global variables: each stage needs fresh ones.
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            end_with(parent)  # a fork has none of its parent's threads
            done = False
            try:
                done = _refusing(lines, lambda stage=stage: say(lines, _rank(server_args, stage, process)))  # type: ignore[misc]
            finally:
                sys.stderr.flush()
                os._exit(0 if done else 1)
        if status := os.waitpid(child, 0)[1]:
            # Where it could not say why, this is why. Only the first reason is read.
            say(lines, Refused(f"building the model ended with status {os.waitstatus_to_exitcode(status)}"))
            return


def _server_args(arguments: Sequence[str]) -> Any:
    """SGLang's arguments of a command line.

    Raises:
        RefusalError: SGLang refuses them.
    """
    from sglang.srt.server_args import prepare_server_args

    _install(ATTN_TP_GATHER)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            server_args = prepare_server_args(list(arguments))
            # Later releases decide on their values in a step of its own.
            getattr(server_args, "resolve_once", lambda: None)()
            return server_args
    except SystemExit as error:
        raise RefusalError((said.getvalue().strip().splitlines() or ["SGLang refuses the arguments"])[-1]) from error
    except Exception as error:
        traceback.print_exc()
        raise RefusalError(f"SGLang refuses the arguments: {one_line(error)}") from error


def _rank(server_args: Any, stage: int, process: Prepared) -> Ranks:
    from sglang_warmstart.sglang.model_targets.groups import stand_alone
    from sglang_warmstart.sglang.model_targets.layers import Calls
    from sglang_warmstart.sglang.model_targets.model import build_model, start_of

    tp_size, stages = (seam().decided(server_args)[name] for name in ("tp_size", "pp_size"))
    stand_alone(stage * tp_size, tp_size * stages)
    with process.on_gpu:
        start = start_of(server_args, 0, stage, build_model)
        runner = start.runner()
        calls = Calls(process.recorder, runner.model_config.dtype)
        runners = [runner]
        try:
            runners += filter(None, [start.draft_runner()])
        except Exception as error:
            calls.not_found.append(NotFound("the model that drafts", where(error)))
        with contextlib.suppress(ImportError):  # it is elsewhere in later releases
            importlib.import_module(MHC)
        _install(MHC_PREWARM)
        for each in runners:
            calls.call(each.model)
            calls.call_split_buckets(each)
    # A rank asks for all of them when it meets the first, also those of more tokens than a prewarm has.
    buckets = [each for target in process.recorder.targets for each in other_buckets(target)]
    return Ranks(
        ranks=tuple(range(stage * tp_size, (stage + 1) * tp_size)),
        models=tuple(type(each.model).__name__ for each in runners),
        layers=calls.count,
        targets=tuple(dict.fromkeys([*process.recorder.targets, *buckets])),
        not_found=tuple(calls.not_found),
        settings={name: each for name, each in os.environ.items() if name.startswith(PREFIXES)},
    )


def _install(feature: Feature) -> None:
    """Give SGLang what the plugin gives to it, as far as it has imported what that is for and does not have it."""
    if find_built_in(feature, Path(sys.modules["sglang"].__path__[0])):
        return
    for step in feature.steps:
        modules = [sys.modules.get(name) for name in step.modules]
        with contextlib.suppress(StandsAsideError):
            if all(modules):
                step.install(Hooks(feature.name), *modules)
