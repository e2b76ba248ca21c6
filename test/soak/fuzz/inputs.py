"""Give every reader of the product very many inputs that are not quite what they should be.

    python test/soak/fuzz/inputs.py [--subject NAME] [--inputs 100000] [--seed N] [--json OUT]
    python test/soak/fuzz/inputs.py --subject NAME --only SEED

It ends with status 1 if an input ended in anything but an error that is documented, in one printable line; took longer
than a limit or more memory than another; wrote outside the directory that it was given; or ran a program.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from kit.hostile import SUBJECTS
from kit.outside import TooSlow, Watch

LIMIT_S = 20.0  # for one input
# Of memory, on top of what the imports take: the largest plan that is read has 256 MiB.
LIMIT_BYTES = 1 << 30
_PROGRAMS = ("nvcc", "cc", "gcc", "g++", "c++", "cicc", "ptxas", "ninja", "sh", "bash", "python", "python3", "touch")


def run(name: str, seeds: range, watch: Watch) -> dict[str, Any]:
    """Give inputs to a subject. Returns what became of them."""
    refused = taken = 0
    failed: dict[int, str] = {}
    slowest, start = (0.0, 0), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        subject = SUBJECTS[name](Path(place))
        with watch.over(Path(place)):
            for seed in seeds:
                watch.outside.clear()
                signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
                begun = time.perf_counter()
                try:
                    if subject.try_one(seed):
                        refused += 1
                    else:
                        taken += 1
                except KeyboardInterrupt:
                    raise
                except BaseException:
                    failed[seed] = traceback.format_exc()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                slowest = max(slowest, (time.perf_counter() - begun, seed))
                if watch.outside:
                    failed[seed] = f"outside: {watch.outside}"
                if os.listdir():  # noqa: PTH208
                    failed[seed] = f"left in the working directory: {os.listdir()}"  # noqa: PTH208
                if len(failed) == 20:
                    break
    return {
        "inputs": refused + taken + len(failed),
        "refused": refused,
        "taken": taken,
        "failed": len(failed),
        "slowest input in s": round(slowest[0], 3),
        "its seed": slowest[1],
        "seconds": round(time.monotonic() - start, 1),
        "failures": failed,
    }


def main() -> int:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, help="the one kind of input; without it, each of them")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many of each")
    parser.add_argument("--seed", type=int, default=0, help="that of the first; the others follow it")
    parser.add_argument("--only", type=int, help="the one input of this seed")
    parser.add_argument("--json", type=lambda name: Path(name).absolute(), help="where what was found is added")
    arguments = parser.parse_args()

    def too_slow(*_: object) -> None:
        raise TooSlow(f"it took more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, too_slow)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES,) * 2)
    seeds = range(arguments.seed, arguments.seed + arguments.inputs)
    if arguments.only is not None:
        seeds = range(arguments.only, arguments.only + 1)
    watch, failed = Watch(), False
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as programs:
        ran = Path(programs, "ran")
        for name in _PROGRAMS:
            path = Path(programs, name)
            path.write_text(f"#!/bin/sh\necho $0 $* >> {ran}\n", encoding="utf-8")
            path.chmod(0o755)
        os.environ["PATH"] = programs
        os.chdir(empty)
        for name in [arguments.subject] if arguments.subject else SUBJECTS:
            report = run(name, seeds, watch)
            if ran.exists():
                report["failures"][-1] = ran.read_text()
            for seed, found in report.pop("failures").items():
                print(f"{name}, seed {seed}:\n{found}", file=sys.stderr)
                failed = True
            report["peak RSS in MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            report["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            print(f"{name}: {report}", flush=True)
            if arguments.json is not None:
                known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
                arguments.json.write_text(json.dumps({**known, name: report}, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
