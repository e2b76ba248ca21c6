"""Make the pictures of docs anew: the page of committed starts, as Chromium shows it.

Run from the root: PYTHONPATH=test .venv/bin/python test/report/picture.py
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.tables import RESULTS, result, run, written
from kit.browser import Browser, browser
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

DOCS = Path(__file__).parents[2] / "docs"
EVENTS = RESULTS / "start_up"
_WIDTH = 1100
# A PNG is this, then chunks: length, kind, data, checksum. The first one is IHDR.
_SIGNATURE, _HEADER_END = b"\x89PNG\r\n\x1a\n", 33
_SOURCE = b"Source\0"


@dataclass(frozen=True)
class Picture:
    """A picture of starts.

    Args:
        name: of its file.
        file: of results that has their events; those of ``EVENTS`` if there is none.
        starts: the name of each there, and here.
    """

    name: str
    file: str
    starts: dict[str, str]

    @property
    def path(self) -> Path:
        """Where it is."""
        return DOCS / self.name

    def runs(self, directory: Path) -> list[Path]:
        """The events of each start; in an empty directory if they have to be written."""
        if not self.file:
            return [EVENTS / name for name in self.starts]
        found = result(self.file)
        return [written(run(found, name)["events"], directory / title) for name, title in self.starts.items()]


PICTURES = (
    Picture("start-up.png", "", {"stock": "stock", "exact": "exact", "warm": "warm"}),
    Picture(
        "start-up-deepseek-v4.png",
        "deepseek-v4-rounds-0.5.23",
        {
            "deepseek-v4-cold-3": "first start",
            "deepseek-v4-early-planned-3": "with a plan",
            "deepseek-v4-warm-2": "warm",
        },
    ),
)


def digest(runs: Sequence[Path]) -> str:
    """What the events of starts are known by: SHA-256 over their files."""
    found = hashlib.sha256()
    for directory in runs:
        for path in sorted(directory.glob("*.jsonl")):
            found.update(path.read_bytes())
    return found.hexdigest()


def source_of(picture: Path) -> str:
    """The digest that a picture was made with; empty if it has none."""
    data = picture.read_bytes()
    length, kind = struct.unpack_from(">I4s", data, _HEADER_END)
    text = data[_HEADER_END + 8 : _HEADER_END + 8 + length]
    return text.removeprefix(_SOURCE).decode() if kind == b"tEXt" and text.startswith(_SOURCE) else ""


def make(chromium: Browser, directory: Path, runs: Sequence[Path]) -> bytes:
    """The picture: the top of the page, with the digest of its events in it."""
    write_page([read_run(each) for each in runs], directory / "page.html")
    chromium.open(directory / "page.html", width=_WIDTH)
    data = chromium.picture_down_to(".frame", scale=1.5)
    chunk = b"tEXt" + _SOURCE + digest(runs).encode()
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_HEADER_END] + framed + data[_HEADER_END:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, browser(Path(place) / "profile") as window:
        for picture in PICTURES:
            picture.path.write_bytes(make(window, Path(place), picture.runs(Path(place))))
