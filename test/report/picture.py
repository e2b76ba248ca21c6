"""Make docs/start-up.png anew: the page of three committed starts, as Chromium shows it.

Run from the root: PYTHONPATH=test .venv/bin/python test/report/picture.py
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zlib
from pathlib import Path

from kit.browser import Browser, browser
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "test" / "gpu" / "results" / "start_up"
PICTURE = ROOT / "docs" / "start-up.png"
STARTS = ("stock", "exact", "warm")
_WIDTH = 1100
# A PNG is this, then chunks: length, kind, data, checksum. The first one is IHDR.
_SIGNATURE, _HEADER_END = b"\x89PNG\r\n\x1a\n", 33
_SOURCE = b"Source\0"


def write_starts(page: Path) -> None:
    """Write the page that the picture shows."""
    write_page([read_run(EVENTS / name) for name in STARTS], page)


def digest() -> str:
    """What the events of the starts are known by: SHA-256 over their files."""
    found = hashlib.sha256()
    for name in STARTS:
        for path in sorted((EVENTS / name).glob("*.jsonl")):
            found.update(path.read_bytes())
    return found.hexdigest()


def source_of(picture: Path) -> str:
    """The digest that a picture was made with; empty if it has none."""
    data = picture.read_bytes()
    length, kind = struct.unpack_from(">I4s", data, _HEADER_END)
    text = data[_HEADER_END + 8 : _HEADER_END + 8 + length]
    return text.removeprefix(_SOURCE).decode() if kind == b"tEXt" and text.startswith(_SOURCE) else ""


def make(chromium: Browser, directory: Path) -> bytes:
    """The picture: the top of the page, with the digest of its events in it."""
    write_starts(directory / "page.html")
    chromium.open(directory / "page.html", width=_WIDTH)
    data = chromium.picture_down_to(".frame", scale=1.5)
    chunk = b"tEXt" + _SOURCE + digest().encode()
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_HEADER_END] + framed + data[_HEADER_END:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, browser(Path(place) / "profile") as window:
        PICTURE.write_bytes(make(window, Path(place)))
