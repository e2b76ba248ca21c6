"""The series of patches that are shipped, one per version of SGLang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.series import patchfile
from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.patchfile import Patch

SHIPPED = Path(__file__).parent / "data"
INDEX, NOTICE = "series", "NOTICE"
_DIRECTORY = re.compile(r"sglang-(\d\S*)")


@dataclass(frozen=True)
class Series:
    """The patches for one version, in the order in which they are applied.

    Args:
        version: of SGLang.
        index: the file that lists them, as quilt writes it.
        notice: the licence notes that go with them, if there are any.
        patches: all of them.
    """

    version: str
    index: Path
    notice: Path | None
    patches: tuple[Patch, ...]


def directories(root: Path) -> Mapping[str, Path]:
    """Where the series of each version lies, the newest version first.

    Raises:
        PatchesError: there is none.
    """
    found = {}
    if root.is_dir():
        for path in root.iterdir():
            named = _DIRECTORY.fullmatch(path.name)
            if named and (path / INDEX).is_file():
                found[named[1]] = path
    if not found:
        raise PatchesError(f"{root} holds no patches: a directory `sglang-VERSION` with a file `{INDEX}` is expected")
    return dict(sorted(found.items(), key=lambda item: _age(item[0]), reverse=True))


def read(version: str, directory: Path) -> Series:
    """Read the series of one version.

    Raises:
        PatchesError: a patch that is listed is not there, or cannot be read.
    """
    index = directory / INDEX
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PatchesError(f"{index} cannot be read ({error})") from error
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    patches = tuple(patchfile.read(directory / name, number) for number, name in enumerate(names, 1))
    notice = directory.parent / NOTICE
    return Series(version, index, notice if notice.is_file() else None, patches)


def read_version(root: Path, version: str | None) -> Series:
    """Read the series of a version; of the newest one if None.

    Raises:
        PatchesError: there is none for that version, or it cannot be read.
    """
    found = directories(root)
    wanted = next(iter(found)) if version is None else version
    if wanted not in found:
        raise PatchesError(f"there are no patches for SGLang {wanted}; there are for {', '.join(found)}")
    return read(wanted, found[wanted])


def _age(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
