"""Servers that start and stop on one cache, again and again, killed at any moment, on a file system that is not well.

WARMSTART_SOAK_CYCLES says how often, WARMSTART_SOAK_SEED from which seed. The numbers go to cycles.json beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import psutil
import pytest
from kit.bad_files import EVERY, LOST, WRITES, BadFiles, Rule
from kit.cache_check import faults_of, rests_in
from kit.cycles import RememberingCompiler, ServerOrder, WriterOrder, half_done
from kit.environment import child_environment, python_path
from kit.node import wait_until
from kit.nogpu import TARGETS, Recorder, call_on
from kit.toolchain import toolchain
from sglang_warmstart.base.private_directory import remove_abandoned
from sglang_warmstart.deepgemm.cache import KernelCache

RESULT = Path(__file__).with_name("cycles.json")
CYCLES = int(os.environ.get("WARMSTART_SOAK_CYCLES", "200"))
SEED = int(os.environ.get("WARMSTART_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)

# Of the JIT whose kernels DeepGEMM of 2025 takes, too. Each target has one kernel.
VERSION = "0.1.7"
SMALL = (
    msgspec.structs.replace(TARGETS[3], m_max=32),
    msgspec.structs.replace(TARGETS[3], m_max=32, num_groups=1),
    msgspec.structs.replace(TARGETS[2], m_max=8, num_groups=1),
)
LIMIT_S = 60.0
# The wait for an answer: the rank's own limits, and a start on a machine that is busy.
ANSWER_S = LIMIT_S + 60.0
# What ends by itself when its server has been killed does so in this time.
END_S = 60.0

_MARK = "KIT_CYCLES"
_COMPILERS = {"nvcc", "cicc", "ptxas", "cudafe++", "fatbinary"}


@dataclass
class Process:
    """A server or a writer."""

    name: str
    popen: subprocess.Popen[str]
    log: Path
    said: dict[str, object] | None = None

    @property
    def is_killed(self) -> bool:
        return self.popen.poll() == -9

    def listen(self) -> bool:
        """Whether it has said what it had to say, or has ended."""
        if self.said is None and (line := self.log.with_suffix(".out").read_text()).endswith("\n"):
            self.said = json.loads(line)
        return self.said is not None or self.popen.poll() is not None


@dataclass
class Numbers:
    """What has been seen."""

    kills: Counter[str] = field(default_factory=Counter)
    weather: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    left_in_scratch: int = 0
    slow_ends: int = 0
    refusals: int = 0
    delays: int = 0
    seconds_to_end: float = 0.0


class Site:
    """All that outlives a cycle."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.cache = KernelCache(directory / "cache")
        self.bad = BadFiles(directory)
        self.bad.seed(seed)
        self.tmp = directory / "t"
        self.tmp.mkdir()
        self.compiler = RememberingCompiler(directory / "nvcc", toolchain().nvcc)
        self.journal = directory / "journal"
        self.journal.touch()
        self.numbers = Numbers()
        self.mark = uuid.uuid4().hex
        recorder = Recorder(VERSION, directory)
        self.kernels = {kernel.directory: kernel for target in SMALL for kernel in recorder.record(target)}
        assert len(self.kernels) == len(SMALL)
        self._started = 0

    def start(self, name: str, order: msgspec.Struct) -> Process:
        """Start one of kit.cycles' programs."""
        self._started += 1
        log = self.directory / "logs" / f"{self._started}-{name}"
        log.parent.mkdir(exist_ok=True)
        environment = {
            **child_environment(),
            **self.bad.environment,
            "PYTHONPATH": python_path(Path(__file__).parents[1]),
            "TMPDIR": str(self.tmp),
            _MARK: self.mark,
        }
        code = f"from kit.cycles import {name}_main; {name}_main()"
        with log.open("wb") as errors, log.with_suffix(".out").open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-c", code, msgspec.json.encode(order).decode()],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                text=True,
            )
        return Process(name, popen, log)

    def server(self, rank: str) -> Process:
        return self.start(
            "server",
            ServerOrder(
                cache=str(self.cache.root),
                compiler=str(self.compiler.path),
                cuda_home=str(toolchain().cuda_home),
                deep_gemm=str(toolchain().deep_gemm_of(VERSION)),
                targets=SMALL,
                rank=rank,
                limit_s=LIMIT_S,
            ),
        )

    def writer(self) -> Process:
        kernels = list(self.kernels.values())
        self.random.shuffle(kernels)
        return self.start(
            "writer", WriterOrder(str(self.cache.root), str(self.compiler.path), tuple(kernels), str(self.journal))
        )

    def processes(self) -> list[psutil.Process]:
        """All that live."""
        return list(self._processes())

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def kind_of(process: psutil.Process) -> str:
    """What a process is for."""
    command = " ".join(process.cmdline())
    if process.name() in _COMPILERS or process.name() in {"sh", "cp", "sleep"}:
        return "compiler"
    for kind, word in (("service", "node.service"), ("server", "server_main"), ("writer", "writer_main")):
        if word in command:
            return kind
    parent = process.parent()
    forked = parent is not None and "forkserver" in " ".join(parent.cmdline())
    return "recorder" if forked else "forkserver" if "forkserver" in command else "other"


def shown(process: psutil.Process) -> str:
    """A process, for a person."""
    with contextlib.suppress(psutil.Error):
        age = time.time() - process.create_time()
        return f"{kind_of(process)}, {age:.0f} s old, child of {process.ppid()}: {' '.join(process.cmdline())[-200:]}"
    return str(process)


def weather(site: Site) -> tuple[str, list[Rule]]:
    """What is wrong with the file system in a cycle."""
    bad, root, choice = site.bad, site.cache.root, site.random
    rules = [bad.set("delay", EVERY, root, ms=choice.choice([5, 20, 60]), per_mille=100)]
    name = choice.choice(
        ["writes slowly", "writes slowly", "refuses", "refuses", "is full", "turns read-only", "hides", "has no locks"]
    )
    if name == "writes slowly":
        # So that a kill comes in the middle of what takes no time elsewhere.
        bad.set("delay", ("create", "write", "sync", "rename"), root, ms=400)
    elif name == "refuses":
        number = choice.choice([errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
        rules.append(bad.refuse(LOST, root, number, per_mille=choice.choice([2, 10, 50])))
    elif name == "is full":
        rules.append(bad.refuse(("write",), root, errno.ENOSPC, per_mille=100))
    elif name == "turns read-only":
        rules.append(bad.refuse(WRITES, root, errno.EROFS, first=choice.randrange(1, 200)))
    elif name == "hides":
        rules.append(bad.set("hide", ("look", "open", "list"), root, ms=300))
    elif name == "has no locks":
        rules.append(bad.refuse(("lock",), root, errno.ENOLCK))
    return name, rules


def wipe(site: Site) -> None:
    """Have work to do again."""
    what = site.random.choice(["all", "all", "kernel", "kernels", "kernels", "markers"])
    if what == "all":
        shutil.rmtree(site.cache.root, ignore_errors=True)
    elif what == "markers":
        shutil.rmtree(site.cache.own / "markers", ignore_errors=True)
    elif what != "nothing":
        there = sorted((site.cache.root / "cache").glob("*"))
        for path in there if what == "kernels" else there[:1]:
            shutil.rmtree(path)


def kill_some(site: Site, until: Callable[[], bool]) -> set[str]:
    """Kill processes at random moments. Returns of which kinds."""
    killed = set()
    for _ in range(site.random.choice([0, 1, 1, 2, 3])):
        wait_until(until, site.random.uniform(0, 5))
        # By their kind first: there are more compilers than servers.
        by_kind: dict[str, list[psutil.Process]] = {}
        for process in site.processes():
            with contextlib.suppress(psutil.Error):
                by_kind.setdefault(kind_of(process), []).append(process)
        if by_kind:
            kind = site.random.choice(sorted(by_kind))
            with contextlib.suppress(psutil.Error):
                site.random.choice(by_kind[kind]).kill()
                site.numbers.kills[kind] += 1
                killed.add(kind)
    return killed


def cycle(site: Site) -> list[str]:
    """One cycle. Returns what was wrong after it."""
    wrong: list[str] = []
    if site.random.random() < 0.6:
        wipe(site)
    name, rules = weather(site)
    site.numbers.weather[name] += 1
    running = [site.server("0"), site.server("1")]
    if site.random.random() < 0.7:
        running.append(site.writer())

    def is_over() -> bool:
        # Each of them: one that is not asked does not hear that it has ended.
        return all([each.listen() for each in running])

    with Sight(site) as sight:
        killed = kill_some(site, is_over)
        if not wait_until(is_over, ANSWER_S):
            wrong += [f"no answer: {each.log}" for each in running if not each.listen()]
    wrong += [f"seen by half: {name}" for name in sight.halves]
    closed = time.monotonic()
    for each in running:
        assert each.popen.stdin is not None
        each.popen.stdin.close()
    if not wait_until(lambda: all([each.popen.poll() is not None for each in running]), END_S):
        wrong += [f"does not end: {each.log}" for each in running if each.popen.poll() is None]
    if not wait_until(lambda: not site.processes(), END_S):
        wrong += [f"still there: {shown(process)}" for process in site.processes()]
    site.numbers.seconds_to_end = max(site.numbers.seconds_to_end, time.monotonic() - closed)
    site.bad.lift_all()
    for process in site.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
    fired = sum(rule.fired for rule in rules[1:])
    site.numbers.delays += rules[0].fired
    site.numbers.refusals += fired
    for each in running:
        wrong += answer_of(site, each, bool(killed or fired))
    # One that says that the cache is too slow for its end leaves what it was at.
    slow = any("at the end: a later start removes" in each.log.read_text(errors="replace") for each in running)
    site.numbers.slow_ends += slow
    return wrong + after(site, killed, bool(fired or slow))


class Sight:
    """Looks at the cache all the time: no kernel of it may ever be seen by half but those that a writer has begun."""

    def __init__(self, site: Site) -> None:
        self.halves: set[str] = set()
        self._site = site
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Sight:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        is_whole = self._site.cache.dialect.is_whole
        while not self._over.wait(0.02):
            for path in (self._site.cache.root / "cache").glob("*"):
                if not is_whole(path) and path.exists() and path.name not in self._site.journal.read_text():
                    self.halves.add(path.name)


def answer_of(site: Site, each: Process, has_reason: bool) -> list[str]:
    """What was wrong with what a process said."""
    log = each.log.read_text(errors="replace")
    if each.name == "server" and "Traceback" in log:
        return [f"a traceback: {each.log}: {log[-2000:]}"]
    if each.is_killed:
        return []
    if each.said is None:
        # The writer is not ours: a fault of the file system ends it.
        return [] if each.name == "writer" and has_reason else [f"it ended without a word: {each.log}: {log[-2000:]}"]
    words = "kernels"
    for word in ("gone", "problem", "errors"):
        if each.said.get(word):
            words = word
    site.numbers.answers[f"{each.name}: {words}"] += 1
    if words != "kernels" and not has_reason:
        return [f"{each.said} for no reason: {each.log}"]
    errors = each.said.get("errors", [])
    assert isinstance(errors, list)
    return [f"more than a line: {error!r}" for error in errors if "\n" in error and "nvcc" not in error]


def after(site: Site, killed: set[str], refused: bool) -> list[str]:
    """What was wrong with what is left."""
    wrong = []
    if "service" in killed or "server" in killed:
        remove_abandoned_in(site.tmp)  # as the next start does
    # The writer's nvcc, where that is killed, leaves files of its own.
    wrong += [f"left: {path}" for path in site.tmp.iterdir() if "warmstart-" in path.name]
    for lock in site.cache.own.glob("locks/*"):
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wrong.append(f"still locked: {lock}")
    begun = half_done(site.journal)
    rests = rests_in(site.cache)
    site.numbers.left_in_scratch += len(rests)
    if rests and not (killed or refused):
        wrong += rests
    for found in faults_of(site.cache):
        path = Path(found.partition(":")[0])
        # A DeepGEMM of 2025 that is killed leaves its half, for whoever needs it to complete.
        if found not in rests and not ("half a kernel" in found and path.name in begun):
            wrong.append(found)
    # What is no half now is nobody's excuse later.
    halves = [path.name for path in (site.cache.root / "cache").glob("*") if not site.cache.dialect.is_whole(path)]
    site.journal.write_text("".join(f"begun {name}\n" for name in sorted(begun.intersection(halves))))
    unknown = {path.name for path in (site.cache.root / "cache").glob("*")} - site.kernels.keys()
    wrong += [f"nobody's kernel: {name}" for name in sorted(unknown)]
    for path in (site.cache.root / "tmp").glob("*"):
        os.utime(path, (0, 0))  # an hour passes
    return wrong


def remove_abandoned_in(directory: Path) -> None:
    """What a start with this TMPDIR does first."""
    subprocess.run(
        [sys.executable, "-c", f"from {remove_abandoned.__module__} import remove_abandoned; remove_abandoned()"],
        env={**os.environ, "TMPDIR": str(directory)},
        check=True,
    )


@pytest.mark.timeout(0)
def test_cycles_leave_a_good_cache_and_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    print(f"seed {SEED}, {CYCLES} cycles")
    # Short: the path of a socket in it has 107 bytes.
    site = Site(tmp_path_factory.mktemp("c"), SEED)
    start, done, wrong = time.monotonic(), 0, []
    try:
        for number in range(CYCLES):
            wrong = cycle(site)
            done = number + 1
            assert not wrong, f"seed {SEED}, cycle {number}: {wrong}"
        # A server that starts on what is left now.
        shutil.rmtree(site.cache.own / "markers", ignore_errors=True)
        last = site.server("0")
        assert wait_until(last.listen, ANSWER_S)
        assert last.popen.stdin is not None
        last.popen.stdin.close()
        last.popen.wait(END_S)
        assert last.said == {"notes": [], "restored": False, "errors": []}
        assert faults_of(site.cache) == []
        assert call_on(str(site.cache.root), VERSION, SMALL, site.directory) == []
    finally:
        for process in site.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seed": SEED,
            "cycles": done,
            "wrong": wrong,
            "seconds": round(time.monotonic() - start),
            "killed": dict(sorted(site.numbers.kills.items())),
            "weather": dict(sorted(site.numbers.weather.items())),
            "answers": dict(sorted(site.numbers.answers.items())),
            "compiled by nvcc": site.compiler.count("nvcc"),
            "compiled from its memory": site.compiler.count("remembered"),
            "calls refused": site.numbers.refusals,
            "calls delayed": site.numbers.delays,
            "seconds until all had ended, at most": round(site.numbers.seconds_to_end, 1),
            "left in the cache's scratch, and removed later": site.numbers.left_in_scratch,
            "cycles in which the cache was too slow for the end of a service": site.numbers.slow_ends,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
