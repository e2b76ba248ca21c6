"""Asks what `plan --model-path` asks, for many servers in one process; and compares plans.

python test/kit/model_targets.py ON_A_GPU.json OF_THE_MODEL.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang.model_targets.ask import SETTINGS, united
from sglang_warmstart.sglang.model_targets.protocol import Answer, Ranks, Refused

# SGLang is imported once. Each server is asked about in a fork, since its place in the world is kept in globals.
_SERVERS = """
import json, os, sys
import msgspec
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.sglang.model_targets import child
process = child.prepared(msgspec.json.decode(sys.argv[1], type=Gpu))
for path, arguments in json.load(sys.stdin):
    forked = os.fork()
    if forked == 0:
        with open(path, "wb") as lines:
            child._refusing(lines, lambda: child.answer(arguments, process, lines))
        os._exit(0)
    os.waitpid(forked, 0)
"""


def asked(servers: dict[str, Sequence[str]], directory: Path, gpu: str = "h200") -> dict[str, list[Ranks] | str]:
    """What is found for each server, by name: its ranks, or why there are none."""
    from kit.environment import child_environment

    paths = {name: directory / f"{number}.json" for number, name in enumerate(servers)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SERVERS, encoded(gpu_of(gpu))],
        input=json.dumps([(str(paths[name]), list(arguments)) for name, arguments in servers.items()]),
        env=child_environment({**SETTINGS, "PYTHONPATH": os.environ.get("PYTHONPATH")}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: _answer(path.read_bytes()) for name, path in paths.items()}


def encoded(gpu: Gpu) -> str:
    return msgspec.json.encode(gpu).decode()


def _answer(lines: bytes) -> list[Ranks] | str:
    said = [msgspec.json.decode(line, type=Answer) for line in lines.splitlines()]
    refused = [each.reason for each in said if isinstance(each, Refused)]
    return refused[0] if refused else united([each for each in said if isinstance(each, Ranks)])


def differences(real: Iterable[Target], found: Iterable[Target]) -> list[str]:
    """What a list of targets lacks, and what it has beyond the real ones."""
    real, found = set(real), set(found)
    return [f"missing {each}" for each in sorted(real - found)] + [f"extra {each}" for each in sorted(found - real)]


def _targets(path: str) -> set[Target]:
    plan = plans.decode(Path(path).read_bytes())
    return {each.target for launch in plan.launches for each in launch.targets}


if __name__ == "__main__":
    lines = differences(_targets(sys.argv[1]), _targets(sys.argv[2]))
    print("\n".join(lines) or "the same targets")
    raise SystemExit(bool(lines))
