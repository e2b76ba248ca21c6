"""A real service hears thousands of frames that are not what they should be, and serves those that come after."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
from kit.hostile import SUBJECTS
from kit.node import Node, Place
from sglang_warmstart.node.protocol import LENGTH, LIMIT

FRAMES = 5000
RESULT = Path(__file__).with_name("result.json")


@pytest.mark.timeout(1800)
def test_it_outlives_them_and_says_of_each_one_line(tmp_path: Path) -> None:
    rng, subject, start = random.Random(0), SUBJECTS["messages"](tmp_path), time.monotonic()
    place = Place(tmp_path / "place")
    with Node(tmp_path) as node:
        node.client().close()  # it waits until the service listens
        for number in range(FRAMES):
            sent = (
                subject.input_of(rng),
                rng.randbytes(rng.choice((0, 1, 3, 4, 5, 100))),
                LENGTH.pack(rng.choice((0, 1, LIMIT, LIMIT + 1, (1 << 32) - 1))) + rng.randbytes(8),
            )[rng.choice((0, 0, 0, 1, 2))]
            with socket.socket(socket.AF_UNIX) as rank, contextlib.suppress(ConnectionError):
                rank.connect(str(node.socket))
                rank.sendall(sent)
                rank.shutdown(socket.SHUT_WR)
                rank.settimeout(30)
                while rank.recv(1 << 16):
                    pass  # until it has closed
            if number % 1000 == 999:
                place.rank(node).close()
        said = node.log
        assert "Traceback" not in said, said[said.index("Traceback") - 2000 :][:6000]
        assert all(line.isprintable() for line in said.split("\n"))
        memory = psutil.Process(node.service).memory_info().rss
        assert memory < 1 << 30
        assert place.nvcc.compiled == {}
    report = {
        "inputs": FRAMES,
        "connections closed with a line": said.count("a connection was closed: "),
        "seconds": round(time.monotonic() - start, 1),
        "RSS of the service in MiB": memory >> 20,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**known, "real service": report}, indent=1) + "\n", encoding="utf-8")
