"""Where the plan of a server's builds is kept, found by its command line: before anything of SGLang is imported.

The plan of a wrong server costs CPU time and nothing else, so the key takes words as they are: two ways to write the
same arguments may have two plans. What matters, and what does not, is as for the launch of a rank
(:mod:`.exact_warmup.launch`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypedDict

from sglang_warmstart.sglang.caches import deep_gemm_cache
from sglang_warmstart.sglang.exact_warmup.immaterial import IMMATERIAL_ARGUMENTS, is_material

# Their configuration counts, wherever it lies. One that is named as on a hub counts by its name and revision.
_MODELS = frozenset({"model_path", "model", "speculative_draft_model_path", "speculative_draft_model"})
_REVISIONS = frozenset({"revision", "speculative_draft_model_revision"})
# SGLang reads arguments from this file.
_FILE_OF_ARGUMENTS = "config"

_MODULE = "sglang.launch_server"
_FILE = "launch_server.py"
_KEY_LENGTH = 32


def plan_for(command: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """Where the plan of the server that a command starts is, or would be; None if it starts none that we know.

    Args:
        command: a command line that starts a server, or the ``sys.argv`` of that server's main process. Both give the
            same place.
        environment: of the command.
    """
    arguments = arguments_of(command)
    if arguments is None:
        return None
    name = f"words-{_key(arguments, environment)[:_KEY_LENGTH]}.json"
    # Not `build_plan.PLANS`: whoever asks before there is a server imports next to nothing.
    return deep_gemm_cache(environment) / "warmstart" / "ahead" / name


class Known(TypedDict, total=False):
    """What is known of a launch before it begins: arguments of :func:`.node.launch.start_early`."""

    build_plan: Path
    guesses: Path
    finder: tuple[str, str]


def known_of(command: Sequence[str], environment: Mapping[str, str]) -> Known:
    """What is known of a launch: its plan, or guesses for a first start, and who finds out about its targets.

    Args:
        command, environment: as of :func:`plan_for`.

    Returns:
        Nothing if nothing is known.
    """
    plan = plan_for(command, environment)
    if plan is None:
        return {}
    if plan.is_file():
        return {"build_plan": plan.absolute()}
    # Here and not above: where there is nothing to build, nobody waits for these imports.
    from sglang_warmstart.sglang.first_start import known_of_first

    try:
        return known_of_first(plan.parent, command, environment)
    except OSError:
        return {}  # a cache that cannot be written: whoever compiles says so


def arguments_of(command: Sequence[str]) -> list[str] | None:
    """The words of a command line that are a server's arguments; None if it starts no server of SGLang."""
    for number, word in enumerate(command):
        rest = list(command[number + 1 :])
        if word == _MODULE and number and command[number - 1] == "-m":
            return rest
        name = PurePath(word).name
        if name == _FILE:
            return rest
        if name == "sglang" and rest[:1] == ["serve"]:
            return rest[1:]
    return None


def _key(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    words = sorted((name, _said(name, values)) for name, values in options_of(arguments).items() if _matters(name))
    variables = sorted((name, value) for name, value in environment.items() if value and is_material(name))
    return hashlib.sha256(os.fsencode(json.dumps([words, variables], ensure_ascii=False))).hexdigest()


def options_of(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Each option, as ``model_path``, with the words behind it. Of one that is given twice, the last one counts."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = [value] if separator else []
        else:
            options.setdefault(name, []).append(word)
    return options


def _matters(name: str) -> bool:
    return name not in IMMATERIAL_ARGUMENTS or name in _MODELS or name in _REVISIONS


def _said(name: str, values: Sequence[str]) -> list[str]:
    """The words of an option; in place of those that name a file, a hash of what is in it."""
    if not values:
        return []
    file = Path(values[-1], "config.json") if name in _MODELS else Path(values[-1])
    if name in _MODELS or name == _FILE_OF_ARGUMENTS:
        try:
            if file.is_file():  # what is read from a pipe is gone for the server
                return [hashlib.sha256(file.read_bytes()).hexdigest()]
        except OSError:
            pass  # there is none on this machine
    return list(values)
