"""Asks a process of its own for the targets of a model, and puts together what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.sglang.model_targets import child
from sglang_warmstart.sglang.model_targets.protocol import Answer, Begun, NotFound, Question, Ranks, Refused
from sglang_warmstart.sglang.model_targets.refusal import RefusalError

# The process must not sweep, compile, load a GPU's libraries or ask the network.
SETTINGS: Mapping[str, str] = {
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    "SGLANG_NCCL_SO_PATH": "/nonexistent",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
_MODEL = ("--model-path", "--model")


def ranks_of(arguments: Sequence[str], gpu: Gpu, begun: Callable[[str], None] = lambda _: None) -> list[Ranks]:
    """What the ranks of a server call, those that are alike together.

    Args:
        arguments: the command line of the server.
        gpu: that it will run on.
        begun: is told of each step.

    Raises:
        RefusalError: it cannot be said.
    """
    check(arguments)
    question = msgspec.json.encode(Question(gpu, tuple(arguments)))
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as log, os.fdopen(reading, "rb") as lines:
        # Not -m, which looks in the working directory first.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {child.__name__} import main; main()"
        command = [sys.executable, "-W", "ignore", "-c", code, str(writing), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, **SETTINGS},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)
        with process:
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it has ended, and its log says why
                    process.stdin.write(question)
                    process.stdin.close()
                found = _read(lines, begun)
            except BaseException:
                process.kill()
                raise
        if not found or process.returncode:
            log.seek(0)
            *_, last = ["", *log.read().decode(errors="replace").strip().splitlines()]
            raise RefusalError(f"the process that builds the model ended with status {process.returncode}: {last}")
    return united(found)


def check(arguments: Sequence[str]) -> None:
    """See that there is something to ask about.

    Raises:
        RefusalError: there is not.
    """
    if importlib.util.find_spec("sglang") is None:
        raise RefusalError("SGLang is not installed here: its own classes say what a model calls")
    path = Path(_value(arguments, *_MODEL) or "")
    if not (path / "config.json").is_file():
        raise RefusalError(f"{path} is no directory with a config.json: nothing is downloaded")


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """Of one that is given twice, the last one counts."""
    found = None
    for number, argument in enumerate(arguments):
        option, separator, value = argument.partition("=")
        if option in names:
            found = value if separator else (arguments[number + 1] if number + 1 < len(arguments) else None)
    return found


def _read(lines: IO[bytes], begun: Callable[[str], None]) -> list[Ranks]:
    found: list[Ranks] = []
    for line in lines:
        said = msgspec.json.decode(line, type=Answer)
        if isinstance(said, Refused):
            raise RefusalError(first_line(said.reason))
        if isinstance(said, Begun):
            begun(said.text)
        else:
            found.append(said)
    return found


def united(found: Sequence[Ranks]) -> list[Ranks]:
    """Ranks with the same targets as one, and layers that failed alike as one line."""
    alike: dict[tuple[object, ...], Ranks] = {}
    for each in found:
        targets, not_found = tuple(sorted(each.targets)), _summed(each.not_found)
        key = (targets, not_found)
        before = alike[key].ranks if key in alike else ()
        alike[key] = msgspec.structs.replace(each, ranks=(*before, *each.ranks), targets=targets, not_found=not_found)
    return list(alike.values())


def _summed(not_found: Sequence[NotFound]) -> tuple[NotFound, ...]:
    """The first of those that differ in nothing but the number of their layer."""
    alike: dict[tuple[str, str], list[str]] = {}
    for each in not_found:
        alike.setdefault((re.sub(r"\d+", "#", each.module), each.reason), []).append(each.module)
    return tuple(
        NotFound(first if not others else f"{first} and {len(others)} like it", reason)
        for (_, reason), (first, *others) in alike.items()
    )
