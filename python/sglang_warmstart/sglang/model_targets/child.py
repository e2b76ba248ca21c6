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
from typing import IO, Any

import msgspec

from sglang_warmstart.base.errors import StandsAsideError, first_line, one_line
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang.attn_tp_gather import ATTN_TP_GATHER
from sglang_warmstart.sglang.feature import Feature
from sglang_warmstart.sglang.m_list import full_m_list
from sglang_warmstart.sglang.mhc_prewarm import MHC, MHC_PREWARM
from sglang_warmstart.sglang.model_targets.protocol import Answer, Question, Ranks, Refused, Step
from sglang_warmstart.sglang.model_targets.refusal import RefusalError


def main() -> None:
    """Read a question from standard input, and write the answer to the descriptor that is the only argument."""
    with os.fdopen(int(sys.argv[1]), "wb") as lines:
        try:
            answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Question), lines)
        except RefusalError as error:
            say(lines, Refused(first_line(error)))
        except Exception as error:
            traceback.print_exc()
            say(lines, Refused(f"the model cannot be built here: {one_line(error)}"))


def say(lines: IO[bytes], line: Answer) -> None:
    lines.write(msgspec.json.encode(line) + b"\n")
    lines.flush()


def answer(question: Question, lines: IO[bytes]) -> None:
    """Say the targets of each rank.

    Raises:
        RefusalError: nothing can be said about this server.
    """
    from sglang_warmstart.sglang.model_targets import missing, pretended_gpu
    from sglang_warmstart.sglang.model_targets.recorder import Recorder

    say(lines, Step("importing SGLang"))
    missing.stand_in()
    recorder = Recorder(question.gpu.num_sms)
    sys.modules |= recorder.modules()
    mode = pretended_gpu.pretend(question.gpu, 8)
    missing.silence_kernels()
    server_args = _server_args(question)
    # Before it forks.
    importlib.import_module("sglang.srt.model_executor.model_runner")
    importlib.import_module("sglang.srt.managers.scheduler")
    recorder.m_max = full_m_list(server_args.chunked_prefill_size)[-1]
    for stage in range(server_args.pp_size):
        say(lines, Step(f"building the model of stage {stage}" if server_args.pp_size > 1 else "building the model"))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                say(lines, _rank(server_args, stage, recorder, mode))
                status = 0
            except RefusalError as error:
                say(lines, Refused(first_line(error)))
            except BaseException as error:
                traceback.print_exc()
                say(lines, Refused(f"the model cannot be built here: {one_line(error)}"))
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            return


def _server_args(question: Question) -> Any:
    """SGLang's arguments of a command line.

    Raises:
        RefusalError: SGLang refuses them.
    """
    from sglang.srt.server_args import prepare_server_args

    _install(ATTN_TP_GATHER)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return prepare_server_args(list(question.arguments))
    except SystemExit as error:
        raise RefusalError((said.getvalue().strip().splitlines() or ["SGLang refuses the arguments"])[-1]) from error
    except Exception as error:
        traceback.print_exc()
        raise RefusalError(f"SGLang refuses the arguments: {one_line(error)}") from error


def _rank(server_args: Any, stage: int, recorder: Any, mode: Any) -> Ranks:
    from sglang_warmstart.sglang.model_targets.groups import stand_alone
    from sglang_warmstart.sglang.model_targets.layers import Calls
    from sglang_warmstart.sglang.model_targets.model import build_model, draft_runner_of, runner_of

    tp_size = server_args.tp_size
    stand_alone(stage * tp_size, tp_size * server_args.pp_size)
    with mode:
        runner = runner_of(server_args, 0, stage, build_model)
        runners = [runner, *filter(None, [draft_runner_of(server_args, 0, build_model)])]
        calls = Calls(recorder, runner.model_config.dtype)
        with contextlib.suppress(ImportError):  # it is elsewhere in later releases
            importlib.import_module(MHC)
        _install(MHC_PREWARM)
        for each in runners:
            calls.call(each.model)
            calls.call_split_buckets(each)
    return Ranks(
        ranks=tuple(range(stage * tp_size, (stage + 1) * tp_size)),
        models=tuple(type(each.model).__name__ for each in runners),
        layers=calls.count,
        targets=tuple(recorder.targets),
        not_found=tuple(calls.not_found),
    )


def _install(feature: Feature) -> None:
    """Give SGLang what the plugin gives to it, as far as it has imported what that is for."""
    for step in feature.steps:
        modules = [sys.modules.get(name) for name in step.modules]
        with contextlib.suppress(StandsAsideError):  # this release has it
            if all(modules):
                step.install(Hooks(feature.name), *modules)


if __name__ == "__main__":
    main()
