"""Open a bundle: from a path, or from a URL of any store that fsspec knows."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sglang_warmstart.bundle.manifest import BundleError

_PIECE = 1 << 20
_LIMIT = 64 << 30
# Of a URL, the user and the password in it, and the query.
_SECRETS = re.compile(r"(\b\w+://)(?:[^\s/]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?")


@contextlib.contextmanager
def opened(place: str, limit_bytes: int = _LIMIT) -> Iterator[BinaryIO]:
    """A bundle as a file that can be read twice: one of another machine is fetched first, into a temporary file.

    A BundleError that is raised while it is open gets the place's name in front.

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
        try:
            yield file
        except BundleError as error:
            raise BundleError(f"{shown(place)}: {error}") from error


def shown(place: str) -> str:
    """A path or URL as it may be logged: without a password and without a query, which may have a signature in it."""
    return _SECRETS.sub(r"\1\2", place)


def _fetched(url: str, scheme: str, limit_bytes: int) -> BinaryIO:
    import fsspec

    target = tempfile.TemporaryFile(prefix="warmstart-bundle-")  # noqa: SIM115  (handed to the caller)
    try:
        # Through the proxies that the environment names, as other programs do.
        options = {"client_kwargs": {"trust_env": True}} if scheme in ("http", "https") else {}
        with fsspec.open(url, "rb", **options) as remote:
            while piece := remote.read(_PIECE):
                if target.tell() + len(piece) > limit_bytes:
                    raise BundleError(f"{shown(url)}: larger than {limit_bytes} bytes")
                target.write(piece)
    except BundleError:
        target.close()
        raise
    except ImportError as error:
        target.close()
        reason = _line(error)
        raise BundleError(f"{shown(url)}: {reason}: pip install 'sglang-warmstart[{_extra_of(scheme)}]'") from error
    except Exception as error:
        # Each store has errors of its own, and all of them mean the same here.
        target.close()
        room = shutil.disk_usage(tempfile.gettempdir()).free
        full = f" ({tempfile.gettempdir()} is full: set TMPDIR)" if room < _PIECE else ""
        raise BundleError(f"{shown(url)}: cannot be fetched: {_line(error)}{full}") from error
    target.seek(0)
    return target


def _extra_of(scheme: str) -> str:
    return {"http": "http", "https": "http", "gcs": "gs"}.get(scheme, scheme)


def _line(error: Exception) -> str:
    # Some stores say no more than that it was not found, where the cause is that nobody answered.
    cause = error.__cause__ or error
    text = _SECRETS.sub(r"\1\2", " ".join(str(cause).split()))
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__
