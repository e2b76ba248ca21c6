"""Write a series where ``git am`` takes it from."""

from __future__ import annotations

from pathlib import Path

from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.series import Series


def export(series: Series, out: Path) -> list[str]:
    """Write a series, with its notice, into a directory. A file that is there already with the same content stays.

    Returns:
        The names of the files.

    Raises:
        PatchesError: a file of another content is there (then nothing is written), or the directory cannot be written.
    """
    sources = [series.index, *(patch.source for patch in series.patches)]
    if series.notice is not None:
        sources.append(series.notice)
    try:
        files = {out / source.name: source.read_bytes() for source in sources}
        missing = {path: data for path, data in files.items() if not _is_there(path, data)}
        for path, data in missing.items():
            write_atomically(path, data)
    except OSError as error:
        raise PatchesError(f"{out} cannot be written ({error.strerror or error})") from error
    return [path.name for path in files]


def _is_there(path: Path, data: bytes) -> bool:
    if not path.exists():
        return False
    if not path.is_file() or path.read_bytes() != data:
        raise PatchesError(f"{path} is there with other content, nothing was written: name an empty directory")
    return True
