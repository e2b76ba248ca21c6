"""Where a bundle is read from: a path, or a URL of any store that fsspec knows."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sglang_warmstart.bundle.manifest import BundleError

_PIECE = 1 << 20
_LIMIT = 64 << 30


@contextlib.contextmanager
def opened(place: str, limit_bytes: int = _LIMIT) -> Iterator[BinaryIO]:
    """A bundle as a file that can be read twice: one of another machine is fetched first, into a temporary file.

    Args:
        place: a path, or a URL such as ``https://...``, ``s3://bucket/key``, ``gs://...`` or ``hf://...``.
        limit_bytes: no more than that is fetched.

    Raises:
        BundleError: it cannot be opened or fetched; says why.
    """
    scheme, separator, path = place.partition("://")
    if not separator or scheme == "file":
        try:
            file: BinaryIO = Path(path if separator else place).open("rb")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise BundleError(f"{place}: {error.strerror or error}") from error
    else:
        file = _fetched(place, scheme, limit_bytes)
    with file:
        yield file


def _fetched(url: str, scheme: str, limit_bytes: int) -> BinaryIO:
    import fsspec

    target = tempfile.TemporaryFile(prefix="warmstart-bundle-")  # noqa: SIM115  (handed to the caller)
    try:
        with fsspec.open(url, "rb") as remote:
            while piece := remote.read(_PIECE):
                if target.tell() + len(piece) > limit_bytes:
                    raise BundleError(f"{url}: larger than {limit_bytes} bytes")
                target.write(piece)
    except BundleError:
        target.close()
        raise
    except ImportError as error:
        target.close()
        raise BundleError(f"{url}: {_line(error)}: pip install 'sglang-warmstart[{_extra_of(scheme)}]'") from error
    except Exception as error:
        # Each store has errors of its own, and all of them mean the same here.
        target.close()
        room = shutil.disk_usage(tempfile.gettempdir()).free
        full = f" ({tempfile.gettempdir()} is full: set TMPDIR)" if room < _PIECE else ""
        raise BundleError(f"{url}: cannot be fetched: {_line(error)}{full}") from error
    target.seek(0)
    return target


def _extra_of(scheme: str) -> str:
    return {"http": "http", "https": "http", "gcs": "gs"}.get(scheme, scheme)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
