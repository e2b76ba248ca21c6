"""Where a path is mounted, for messages. It asks the kernel alone: the file system itself may not answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")


def mount_of(path: Path, mounts: Path = _MOUNTS) -> str:
    """Where the file system of a path is mounted, and its type, such as "/models, nfs4".

    Args:
        mounts: the kernel's account of the mounts of this process.

    Returns:
        "a file system that is not known" where the kernel does not say.
    """
    place, found = Path(os.path.abspath(path)), ""  # noqa: PTH100  (Path.resolve looks at each part of it)
    longest = -1
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    for line in lines:
        before, separator, after = line.partition(" - ")
        if not separator or len(fields := before.split()) < 5 or not after:
            continue
        point = Path(_unescaped(fields[4]))
        # Of two at one point, the later one covers the other.
        if (point == place or point in place.parents) and len(point.parts) >= longest:
            longest, found = len(point.parts), f"{point}, {after.split()[0]}"
    return found or "a file system that is not known"


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), text)
