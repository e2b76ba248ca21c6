"""What a start would save if a rank's interpreter imported SGLang while the main process does so too.

    .venv/bin/python test/early_rank.py
    .venv-0.5.23/bin/python test/early_rank.py

Starts SGLang's server on a CPU, as it is and so in turn, and puts the release into early_rank.json beside it. This is a
measurement, and no feature: to hand a rank over to a process that is there already, private functions of
`multiprocessing` are replaced, and with them SGLang's start method.
"""

from __future__ import annotations

import array
import json
import os
import pickle
import re
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import popen_spawn_posix, spawn, util
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_name("early_rank.json")
ROUNDS = 5
WAIT = "import sys; sys.path.insert(0, sys.argv[1]); import early_rank; early_rank.become_rank(int(sys.argv[2]))"
HIGH = 900  # a file descriptor that a rank does not expect to have
MAX = 64


def become_rank(descriptor: int) -> None:
    """Import what a rank does, and go on as the process that `multiprocessing` would have started."""
    import sglang.srt.managers.scheduler  # noqa: F401

    os.dup2(descriptor, HIGH)
    os.close(descriptor)
    with socket.socket(fileno=HIGH) as orders:
        data, descriptors, *_ = socket.recv_fds(orders, 1 << 20, MAX)
    if not data:
        sys.exit()  # there was no rank
    environment, numbers, words = pickle.loads(data)
    os.environ.clear()
    os.environ.update(environment)
    high = [os.dup2(each, HIGH + place) for place, each in enumerate(descriptors)]
    for each in descriptors:
        os.close(each)
    for number, each in zip(numbers, high, strict=True):
        assert not Path(f"/proc/self/fd/{number}").exists(), "taken by something that was imported"
        os.dup2(each, number)
        os.close(each)
    sys.argv = [sys.argv[0], "--multiprocessing-fork"]
    spawn.spawn_main(**{name: int(number) for name, number in re.findall(r"(\w+_\w+)=(\d+)", " ".join(words))})


def serve(arguments: list[str]) -> None:
    """Become SGLang's main process, whose first rank is such a process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-W", "ignore", "-c", WAIT, str(Path(__file__).parent), str(theirs.fileno())]
    early = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    launch, start = popen_spawn_posix.Popen._launch, util.spawnv_passfds  # type: ignore[attr-defined]

    def hand_over(path: bytes, words: list[Any], numbers: list[int]) -> int:
        if b"spawn_main" not in b" ".join(map(os.fsencode, words)):  # it is the tracker of resources
            return int(start(path, words, numbers))
        message = pickle.dumps((dict(os.environ), numbers, [os.fsdecode(word) for word in words]))
        ours.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))])
        ours.close()
        return early.pid

    def launch_early(self: Any, process: Any) -> None:
        is_rank = getattr(process._target, "__name__", "").startswith("run_scheduler_process")
        util.spawnv_passfds = hand_over if is_rank and ours.fileno() >= 0 else start  # type: ignore[attr-defined]
        launch(self, process)

    popen_spawn_posix.Popen._launch = launch_early  # type: ignore[attr-defined]
    sys.argv = ["launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def main() -> None:
    """Measure in rounds, each way beside the other."""
    sys.path.insert(0, str(Path(__file__).parent))
    from kit import environment
    from kit.model import write_tiny_llama
    from kit.ports import free_ports
    from kit.process import ServerProcess
    from kit.release import installed_release
    from kit.server import as_options, cpu_server_args

    environment.isolate()
    ways = {
        "as it is": ["-m", "sglang.launch_server"],
        "with an early rank": [__file__, "serve"],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_llama(Path(scratch))
        # One start of each for what the first alone compiles and reads.
        for number in range(ROUNDS + 1):
            for way, words in ways.items():
                port, nccl_port = free_ports(2)
                options = as_options(cpu_server_args(model, port, nccl_port))
                begin = time.monotonic()
                with ServerProcess(
                    [sys.executable, "-W", "ignore", *words, *options], port, environment.child_environment()
                ) as server:
                    took = time.monotonic() - begin
                    assert len(server.generate([5, 6, 7], max_new_tokens=3)) == 3
                print(f"{way}: {took:.1f} s", flush=True)
                if number:
                    seconds[way].append(round(took, 2))
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known[installed_release().version] = {
        "cores": os.cpu_count(),
        "median_s": {way: statistics.median(each) for way, each in seconds.items()},
        "raw_s": seconds,
    }
    RESULT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
