"""Find a tree of SGLang and its version, without importing it."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.cli.patch_errors import NO_TREE, PatchesError

_DESCRIBED = re.compile(r"v(\d\S*?)(?:-\d+-g[0-9a-f]+)?")
_ASSIGNED = re.compile(r"""^(?:(?:__version__|version)\s*=\s*)+(['"])(\d[^'"]*)\1""", re.MULTILINE)
# What SGLang's build writes where it finds no tag.
_NO_VERSION = "0.0.0"


@dataclass(frozen=True)
class Tree:
    """A tree of SGLang.

    Args:
        package: the directory of the package ``sglang``, links resolved.
        version: None if it cannot be told.
        told_by: where the version was found.
    """

    package: Path
    version: str | None
    told_by: str

    @property
    def holder(self) -> Path:
        """The directory that holds the package."""
        return self.package.parent

    def locate(self, path: str) -> Path:
        """Where a file of a patch lies.

        Args:
            path: as in the patch, ``sglang/...``. The package's own directory may have another name.
        """
        return self.package / path.removeprefix("sglang/")

    @property
    def description(self) -> str:
        """The tree in a few words, for the user."""
        name = f"SGLang {self.version} ({self.told_by})" if self.version else "SGLang of a version that cannot be told"
        return f"{name} in {self.package}"

    def is_version(self, version: str) -> bool:
        """Whether this is the version, or a fork's local version of it (``0.5.12+fork.3``)."""
        return self.version is not None and self.version.partition("+")[0] == version


def find(place: Path | None) -> Tree:
    """Find the SGLang in a directory, or the one that is installed here if None.

    Args:
        place: a checkout or source tree, an unpacked wheel, a site-packages directory, or the package itself.

    Raises:
        PatchesError: there is none.
    """
    package = _installed() if place is None else _package_in(place)
    try:
        package = package.resolve(strict=True)
    except OSError as error:
        raise PatchesError(f"{package} cannot be read ({error.strerror or error})", NO_TREE) from error
    for told_by, version in _versions(package):
        if version is not None and not version.startswith(_NO_VERSION):
            return Tree(package, version, told_by)
    return Tree(package, None, "")


def _installed() -> Path:
    try:
        spec = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        spec = None
    # A directory `sglang` without a Python file in it is found as a namespace package, which has no origin.
    if spec is None or spec.origin is None:
        raise PatchesError(
            "SGLang is not installed here: name a tree of it, or install it (pip install sglang==0.5.12)", NO_TREE
        )
    package = Path(spec.origin).parent
    if not _is_package(package):
        raise PatchesError(f"what is installed here as `sglang` is not SGLang: {package} has no `srt`", NO_TREE)
    return package


def _package_in(place: Path) -> Path:
    if not place.is_dir():
        raise PatchesError(f"{place} is not a directory: name one that holds SGLang's package", NO_TREE)
    for package in (place / "python" / "sglang", place / "sglang"):
        if _is_package(package):
            return package
    if place.resolve().name == "sglang" and _is_package(place):
        return place
    raise PatchesError(
        f"{place} holds no SGLang: name a checkout (python/sglang is in it), an unpacked wheel or a site-packages "
        "directory (sglang is in it), or the package directory `sglang` itself",
        NO_TREE,
    )


def _is_package(path: Path) -> bool:
    return (path / "srt").is_dir()


def _versions(package: Path) -> Iterator[tuple[str, str | None]]:
    """What each place that may know the version says, the most reliable one first."""
    described = _describe(package)
    named = _DESCRIBED.fullmatch(described)
    yield f"git describe: {described}", named[1] if named else None
    assigned = _ASSIGNED.search(_text(package / "_version.py"))
    yield f"{package.name}/_version.py", assigned[2] if assigned else None
    # After an upgrade that was cut off there are two, and nobody knows which one is right.
    distributions = list(package.parent.glob("sglang-*.dist-info"))
    if len(distributions) == 1:
        yield f"{distributions[0].name}/METADATA", _metadata_version(distributions[0] / "METADATA")
    for information in ("PKG-INFO", "sglang.egg-info/PKG-INFO"):
        yield information, _metadata_version(package.parent / information)


def _describe(package: Path) -> str:
    """What ``git describe`` says of the commit that is checked out. Empty if this is not a checkout of SGLang.

    A tree that only lies in a repository (an environment in somebody's project, a vendored copy) has that one's tags
    above it, not SGLang's.
    """
    if _git(package, "rev-parse", "--show-prefix") != "python/sglang/" or not _git(package, "ls-files", "srt"):
        return ""
    return _git(package, "describe", "--tags", "--match", "v*", "--abbrev=7", "HEAD")


def _git(directory: Path, *arguments: str) -> str:
    # A hook that runs us has its own repository in the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _metadata_version(path: Path) -> str | None:
    version = email.message_from_string(_text(path))["Version"]
    return str(version).strip() if version else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
