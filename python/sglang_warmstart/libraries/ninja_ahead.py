"""What ninja has built for FlashInfer or tvm-ffi, built again: in the same directory, by the same commands.

A library that finds it runs ninja too, which has nothing left to do, as long as the commands are the same to the
letter. No part of the library is imported for it, and neither is torch: a build begins at once.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.libraries import calls
from sglang_warmstart.libraries.anchors import NoAnchorError, anchored, anchors_of, placed
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import BuildError, why

# The statement that says what a file is made of: "build OUT: RULE IN IN | IMPLICIT || ORDER".
_STATEMENT = re.compile(r"^build .*?(?<!\$): \S+ (.*)$", re.MULTILINE)
_SUFFIXES = (".cu", ".cuh", ".cc", ".cpp", ".h", ".hpp", ".inc")
# A module has a few; some FlashInfer modules have hundreds of instantiations.
_SOURCES_MAX = 4 << 20


class NinjaBuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ninja is told. All paths are relative to the library's root; texts have anchors for others.

    Args:
        directory: in which ninja runs.
        file: its ``build.ninja``.
        text: of that file.
        sources: files that the library has written, by path.
        lock: that the library holds meanwhile.
    """

    directory: str
    file: str
    text: str
    sources: dict[str, str]
    lock: str


def described(root: Path, directory: Path, file: Path, lock: Path, environment: Environment) -> dict[str, Any] | None:
    """The form of a recipe for what ninja is about to build; None if it reaches beyond what can be written down.

    Args:
        root: of the library's cache.
        directory, file: with which ninja is run.
        lock: that the library holds.
    """
    root, directory = root.resolve(), directory.resolve()
    anchors = anchors_of(root, environment)
    try:
        text = file.read_text(encoding="utf-8")
        sources = {
            str(path.relative_to(root)): anchored(path.read_text(encoding="utf-8"), anchors)
            for path in _written_sources(text, root, directory)
        }
        form = NinjaBuild(
            str(directory.relative_to(root)),
            str(file.resolve().relative_to(root)),
            anchored(text, anchors),
            sources,
            str(lock.resolve().relative_to(root)),
        )
    except (OSError, ValueError, NoAnchorError):
        return None
    return dict(msgspec.to_builtins(form)) if sum(map(len, sources.values())) < _SOURCES_MAX else None


def _written_sources(text: str, root: Path, directory: Path) -> list[Path]:
    """The sources below the root, and what lies beside them: the library writes headers for them, too."""
    named = {
        (directory / word.replace("$ ", " ").replace("$:", ":")).resolve()
        for inputs in _STATEMENT.findall(text)
        for word in re.split(r"(?<!\$) +", inputs)
    }
    ours = [path for path in named if path.is_relative_to(root) and path.is_file() and path.suffix not in (".o", ".so")]
    # Not beside those that lie in the directory of all modules' sources.
    own = {each.parent for each in ours} - {directory, root} - set(root.glob("*/generated"))
    beside = {path for each in own for path in each.iterdir() if path.is_file() and path.suffix in _SUFFIXES}
    return sorted(beside.union(ours))


def prepare(form: Mapping[str, Any]) -> None:
    """Nothing has to be imported where ninja's text is known."""
    if calls.is_call(form):
        calls.prepare(form)


def build(form: Mapping[str, Any], root: Path | None, environment: Environment) -> None:
    """Have ninja build it, while we hold the library's lock; or the library itself, by a call.

    Args:
        root: of the library's cache.

    Raises:
        BuildError: it cannot.
    """
    if root is None:
        raise BuildError("the library has no cache here")
    if calls.is_call(form):
        calls.build(form)
        return
    try:
        root = root.resolve()
        what, anchors = msgspec.convert(form, NinjaBuild), anchors_of(root, environment)
        directory, file, lock = (_below(root, path) for path in (what.directory, what.file, what.lock))
        files = {_below(root, path): placed(text, anchors) for path, text in what.sources.items()}
        files[file] = placed(what.text, anchors)
        _build_locked(directory, file, lock, files, environment)
    except (OSError, ValueError, NoAnchorError) as error:
        raise BuildError(first_line(error)) from error


def _build_locked(directory: Path, file: Path, lock: Path, files: Mapping[Path, str], environment: Environment) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # whoever has started this process ends it after a while
        if next(directory.glob("*.so"), None) is not None:
            return  # whoever held the lock has built it
        for path, text in files.items():
            # As the libraries do it: ninja goes by the time of a source.
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_atomically(path, text.encode())
        command = ["ninja", "-C", str(directory), "-f", str(file)]
        if (jobs := environment.get("MAX_JOBS", "")).isdecimal():
            command += ["-j", jobs]
        done = subprocess.run(
            command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise BuildError(why(done.stdout))


def _below(root: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise BuildError(f"{path!r} is no path below the cache")
    place = (root / parts).resolve()
    # A link in the cache leads elsewhere.
    if not place.is_relative_to(root):
        raise BuildError(f"{path!r} leads out of the cache")
    return place
