"""Does a test catch it? Breaks the plugin in one place at a time and runs the tests of that place.

    python test/soak/mutants.py [--list] [--only WORD] [--result FILE] [--limit-s SECONDS]

There are two kinds of mutants: each step of each feature does nothing, and each line of `LINES` is replaced. A copy of
python/ is changed, never the tree itself. The tests must pass on the unchanged copy first. A mutant is caught if they
fail on the changed one. The exit status is 1 if one is not caught, and 2 if a line of the table is not found once.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = Path("python/sglang_warmstart")
_ONE_RUN_LIMIT_S = 600.0


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` (below the package), and becomes `new`; `tests` (below test/) are to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _line(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tests)


_CACHE, _MARKER = "deepgemm/cache.py", "deepgemm/marker.py"
_T_CACHE, _T_MARKER = "deepgemm/test_cache.py", "deepgemm/test_marker.py"
_SCAN = "bundle/archive.py"
_T_SCAN = ("bundle/test_archive.py", "bundle/test_signature.py", "bundle/test_restore.py")

LINES = (
    _line(
        "publish: the rename",
        "base/files.py",
        "        os.rename(directory, place, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)\n",
        "        pass\n",
        _T_CACHE,
    ),
    _line(
        "publish: who was faster keeps it",
        "base/files.py",
        "if error.errno not in _TAKEN:",
        "if True:",
        "base/test_files.py",
    ),
    _line(
        "publish: the stub's mark",
        _CACHE,
        "if stub.is_stub(data) else",
        "if False else",
        _T_CACHE,
        "deepgemm/test_stand_in.py",
    ),
    _line("publish: a whole cubin", _CACHE, "else cubin.defect_of(data)", "else None", _T_CACHE),
    _line(
        "publish: half a kernel in the way",
        _CACHE,
        "if path.exists() and not self.has(directory):",
        "if False:",
        _T_CACHE,
    ),
    _line("publish: no rest in tmp", "base/files.py", "shutil.rmtree(temporary, ignore_errors=True)", "pass", _T_CACHE),
    _line(
        "publish: what is there is no failure",
        "base/files.py",
        "    with suppress(OSError):\n        sync(directory)\n",
        "    sync(directory)\n",
        "base/test_each_call_fails.py",
    ),
    _line(
        "files: a mount that hangs is done without",
        "base/answers.py",
        "        return begun(call).result(limit_s)\n",
        "        return begun(call).result()\n",
        "base/test_runs_on_bad_files.py",
    ),
    _line(
        "disk: one that does not answer is not asked again",
        "node/disk.py",
        "if self._problem is not None:",
        "if False:",
        "node/test_disk.py",
    ),
    _line(
        "votes: who has not joined is not waited for",
        "sglang/votes.py",
        "VOTE_S if self._store.check(joined) else JOIN_S",
        "VOTE_S",
        "sglang/test_votes.py",
    ),
    _line(
        "votes: the first proposal stands",
        "sglang/votes.py",
        'int(self._store.compare_set(self._key(matter, "answer"), "", proposal))',
        "int(proposal)",
        "sglang/test_votes.py",
    ),
    _line(
        "votes: one that has left is not waited for",
        "sglang/votes.py",
        'over = [self._key(matter, "answer"), self._key(_group(ranks), "left")]',
        'over = [self._key(matter, "answer")]',
        "sglang/test_votes.py",
    ),
    _line(
        "votes: a second process in the place of a rank has none",
        "sglang/votes.py",
        "if self._store is None or not self._is_first:",
        "if self._store is None:",
        "sglang/test_votes.py",
    ),
    _line(
        "pool: a lock that is held has a bound",
        "node/pool.py",
        "end = time.monotonic() + LOCK_S",
        "end = time.monotonic() + 600",
        "test_bounds.py",
    ),
    _line(
        "files: the clock of the file system",
        "base/files.py",
        "        now = fresh.stat().st_mtime\n",
        "        now = __import__('time').time()\n",
        "base/test_runs_on_bad_files.py",
    ),
    _line(
        "cache: what cannot be looked at is not there",
        "deepgemm/dialects/dialect.py",
        "os.path.isfile(entry / name)",
        "(entry / name).is_file()",
        "node/test_service_on_bad_files.py",
    ),
    _line(
        "marker: a stale handle is no defect",
        _MARKER,
        "            if error.errno == errno.ESTALE:\n",
        "            if False:\n",
        "node/test_service_on_bad_files.py",
    ),
    _line(
        "locks: one that is held",
        "base/locks.py",
        "    except BlockingIOError:\n        return False\n",
        "    except BlockingIOError:\n        return True\n",
        "base/test_locks.py",
    ),
    _line(
        "service: a left target is tried again",
        "node/service.py",
        'work.result().state == "left"',
        "False",
        "node/test_service.py",
    ),
    _line(
        "service: an empty answer is an answer",
        "node/service.py",
        "if finished or left or not answers else []",
        "if finished or left else []",
        "node/test_service.py",
    ),
    _line(
        "service: children per GPU",
        "node/service.py",
        "self._recording[device] < places",
        "True",
        "node/test_service.py",
    ),
    _line(
        "rank: sweeps what is left",
        "sglang/exact_warmup/rank.py",
        "                    self.sweep(*key[:4], self.ledger[key].no_context, self._wait_left_s)\n",
        "                    pass\n",
        "sglang/test_deep_gemm_rank.py",
    ),
    _line(
        "rank: a forward has its own time",
        "sglang/exact_warmup/rank.py",
        'may take in it."""\n        self._wait_left_s = FORWARD_WAIT_S',
        'may take in it."""',
        "sglang/test_deep_gemm_rank.py",
    ),
    _line(
        "rank: all buckets at once",
        "sglang/exact_warmup/rank.py",
        "return [target, *(each",
        "return [target, *(each for each in () if each",
        "sglang/test_deep_gemm_rank.py",
    ),
    _line(
        "further: whose kernel it is",
        "deepgemm/further.py",
        "if service is None or owner == str(service):",
        "if True:",
        "deepgemm/test_further.py",
    ),
    _line(
        "further: no marker of a launch without targets",
        "deepgemm/marker.py",
        "                if if_there:\n                    return False\n",
        "                pass\n",
        "node/test_service.py",
    ),
    _line(
        "further: at the end of a server",
        "node/service.py",
        "        await asyncio.wait_for(service.end(path), END_S)\n",
        "        pass\n",
        "node/test_service.py",
    ),
    _line("cubin: truncated", "deepgemm/cubin.py", "if len(cubin) < needed:", "if False:", "deepgemm/test_cubin.py"),
    _line(
        "cubin: not ELF",
        "deepgemm/cubin.py",
        'if cubin[:5] != b"\\x7fELF\\x02" or len(cubin) < _HEADER_SIZE:',
        "if False:",
        "deepgemm/test_cubin.py",
    ),
    _line(
        "marker: its identity",
        _MARKER,
        "if marker.identity.digest != self.identity.digest:",
        "if False:",
        _T_MARKER,
    ),
    _line("marker: its format", _MARKER, "if marker.format != FORMAT:", "if False:", _T_MARKER),
    _line("marker: its launch", _MARKER, "if marker.launch != launch:", "if False:", _T_MARKER),
    _line("marker: the checksum", _MARKER, "if found != file:", "if False:", _T_MARKER),
    _line("marker: the kernels are there", _MARKER, "        if defects:\n", "        if False:\n", _T_MARKER),
    _line(
        "marker: targets and files agree",
        _MARKER,
        "if named != {file.directory for file in marker.files}:",
        "if False:",
        _T_MARKER,
    ),
    _line("marker: a broken kernel is set aside", _MARKER, "self._set_aside(file.directory)", "pass", _T_MARKER),
    _line(
        "marker: what it has is kept",
        _MARKER,
        "known |= {each.target: each for each in finished}",
        "known = {each.target: each for each in finished}",
        _T_MARKER,
    ),
    _line(
        "compiler: nice",
        "deepgemm/compiler.py",
        "os.setpriority(os.PRIO_PGRP, process.pid, _NICE)",
        "pass",
        "deepgemm/test_compiler.py",
    ),
    _line(
        "compiler: the group is killed",
        "deepgemm/compiler.py",
        "os.killpg(process.pid, signal.SIGKILL)",
        "process.kill()",
        "deepgemm/test_compiler.py",
    ),
    _line(
        "compiler: its exit status", "deepgemm/compiler.py", "if status != 0:", "if False:", "deepgemm/test_compiler.py"
    ),
    _line(
        "compiler: none begins after the end",
        "deepgemm/compiler.py",
        "self._closed = True",
        "pass",
        "deepgemm/test_compiler.py",
    ),
    _line(
        "guard: the original goes on",
        "base/guard.py",
        "if error is call.error or is_intended(error) or STRICT.value(os.environ):",
        "if True:",
        "base/test_guard.py",
    ),
    _line("guard: strict mode", "base/guard.py", " or STRICT.value(os.environ):", ":", "base/test_guard.py"),
    _line("guard: the original's error", "base/guard.py", "raise call.error", "pass", "base/test_guard.py"),
    _line(
        "guard: never called twice",
        "base/guard.py",
        "return call.result if call.returned else original(*args, **kwargs)",
        "return original(*args, **kwargs)",
        "base/test_guard.py",
    ),
    _line("guard: one warning", "base/guard.py", "warned = True", "pass", "base/test_guard.py"),
    _line("hooks: dead after undo", "base/hooks.py", "self._life.alive = False", "pass", "base/test_hooks.py"),
    _line(
        "hooks: the parameters",
        "base/hooks.py",
        'raise StandsAsideError(target, f"expected parameters',
        'print(target, f"expected parameters',
        "base/test_hooks.py",
    ),
    _line("copies are mended", "base/copies.py", "setattr(module, name, value)", "pass", "base/test_copies.py"),
    _line("copies: one look for all", "base/copies.py", "_pending.depth += 1", "pass", "base/test_copies.py"),
    _line(
        "hooks: never twice",
        "base/hooks.py",
        'raise StandsAsideError(_dotted(owner, name), "already patched by this feature")',
        "pass",
        "base/test_hooks.py",
    ),
    _line(
        "source edit: overlap",
        "base/source_edit.py",
        'raise StandsAsideError(target, f"two edits overlap',
        'print(target, f"two edits overlap',
        "base/test_source_edit.py",
    ),
    _line(
        "client: the limit of a wait",
        "node/client.py",
        "self._socket.settimeout(max(0.001, end - time.monotonic()))",
        "self._socket.settimeout(5)",
        "node/test_client.py",
    ),
    _line(
        "client: a closed connection",
        "node/client.py",
        'raise ServiceGoneError("the service has closed the connection")',
        "return bytes(parts)",
        "node/test_client.py",
    ),
    _line(
        "client: another answer",
        "node/client.py",
        "if not isinstance(answer, kind):",
        "if False:",
        "node/test_client.py",
    ),
    _line("archive: the checksum", _SCAN, "if found.hexdigest() != sha256:", "if False:", *_T_SCAN),
    _line(
        "archive: the limit",
        _SCAN,
        "if (size := _unpacked_size(manifest)) > limit_bytes:",
        "if (size := _unpacked_size(manifest)) < 0:",
        *_T_SCAN,
    ),
    _line("archive: the signature is checked", _SCAN, "key.check(data, signature)", "pass", *_T_SCAN),
    _line(
        "archive: a key wants a signature", _SCAN, "        elif key is not None:\n", "        elif False:\n", *_T_SCAN
    ),
    _line(
        "archive: nothing after the end",
        _SCAN,
        "if self._bytes or self._zstd.unused_data or self._packed or self._read():",
        "if False:",
        *_T_SCAN,
    ),
    _line(
        "archive: unchanged since it was checked",
        _SCAN,
        "if expected is not None and expected != manifest:",
        "if False:",
        *_T_SCAN,
    ),
    _line(
        "restore: kernels of its plan",
        "bundle/restore.py",
        "if defects := defects_of(manifest, missing, Path(staging)):",
        "if defects := []:",
        "bundle/test_restore.py",
    ),
    _line(
        "monitor: refused before it is compiled",
        "libraries/monitor.py",
        "    if is_refusing():\n",
        "    if False:\n",
        "libraries/test_watch_libraries.py",
    ),
    _line(
        "monitor: ninja is asked first",
        "libraries/ninja.py",
        "if is_refusing() and _has_work(directory, file):",
        "if False:",
        "libraries/test_watch_libraries.py",
    ),
    _line(
        "monitor: ninja's answer",
        "libraries/ninja.py",
        'return "ninja: no work to do." not in said',
        "return True",
        "libraries/test_watch_libraries.py",
    ),
    _line(
        "monitor: DeepGEMM's compiler is not run",
        "libraries/deep_gemm_front.py",
        'if refuse == "1" and serving:',
        "if False:",
        "libraries/test_deep_gemm_front.py",
    ),
    _line(
        "caches: SGLang is asked",
        "sglang/caches.py",
        "return {**_asked(source, environment), **environment}",
        "return dict(environment)",
        "sglang/test_caches.py",
    ),
    _line(
        "a sweep ends with its forward",
        "sglang/exact_warmup/warmup.py",
        "        if time.perf_counter() >= self._until:\n",
        "        if False:\n",
        "sglang/test_deep_gemm_rank.py",
    ),
    _line(
        "an extend forward is a prefill",
        "sglang/seams/seam.py",
        "set_is_extend_in_batch(forward_mode_override == ForwardMode.EXTEND)",
        "set_is_extend_in_batch(False)",
        "sglang/test_exact_warmup.py",
    ),
    _line(
        "targets by rule",
        "sglang/exact_warmup/unreached.py",
        "    return [target for target in further if target not in found]",
        "    return []",
        "sglang/test_unreached.py",
    ),
    _line(
        "ranks agree",
        "sglang/exact_warmup/warmup.py",
        'end = agree(f"forward {number}", _WENT_WELL if failure is None else _FAILED)',
        "end = _WENT_WELL if failure is None else _FAILED",
        "sglang/test_exact_warmup.py",
        "sglang/test_deep_gemm_rank.py",
    ),
    _line(
        "trust: every user can write it",
        "base/trust.py",
        "elif found.st_mode & stat.S_IWOTH:",
        "elif False:",
        "base/test_trust.py",
    ),
    _line(
        "trust: the service asks",
        "node/service.py",
        ".ask(trust.check_caches, dialect.roots(hello.cache), os.environ)",
        ".ask(str)",
        "node/test_service.py",
    ),
    _line(
        "trust: stand-ins",
        "deepgemm/nogpu/build.py",
        "trust.check((directory.parent.parent, directory.parent, directory), environment)",
        "pass",
        "deepgemm/test_nogpu.py",
    ),
    _line(
        "flags: of a plan",
        "deepgemm/plan.py",
        "if (option := unknown_option(line, INCLUDE)) is not None:",
        "if False:",
        "deepgemm/test_flags.py",
    ),
    _line(
        "flags: of a marker that is exported",
        "bundle/packing.py",
        'if (option := unknown_option(flags, str(Path(marker.identity.installed_in, "include")))) is not None:',
        "if False:",
        "bundle/test_packing.py",
    ),
    _line(
        "marker: names are no paths",
        _MARKER,
        "self.cache.dialect.kernel_name(file.directory)",
        "pass",
        _T_MARKER,
    ),
    _line(
        "further kernels: names are no paths",
        "deepgemm/further.py",
        "            cache.dialect.kernel_name(name)\n",
        "",
        "deepgemm/test_further.py",
    ),
    _line(
        "a terminal obeys nothing",
        "base/errors.py",
        'return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)',
        "return message",
        "bundle/test_manifest.py",
        "test_hostile_input.py",
    ),
    _line(
        "secrets: a long word is looked through once",
        "bundle/source.py",
        r're.compile(r"(\b\w+://)',
        r're.compile(r"(\w+://)',
        "bundle/test_source.py",
    ),
)


def steps() -> list[Mutant]:
    """Each step of each feature, as one that changes nothing."""
    found = []
    directory = ROOT / PACKAGE / "sglang"
    for path in sorted(directory.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Step":
                old = ast.get_source_segment(text, node)
                install = ast.get_source_segment(text, node.args[1])
                modules = ast.get_source_segment(text, node.args[0])
                assert old is not None and install is not None and modules is not None
                inside = path.relative_to(directory)
                tests = _TESTS_OF_STEPS.get(inside.parts[0], (f"sglang/test_{path.stem}.py",))
                new = old.replace(modules, "@", 1).replace(install, "lambda *_: None", 1).replace("@", modules, 1)
                found.append(Mutant(f"step: {inside} {install}", f"sglang/{inside}", old, new, tests))
    return found


# Otherwise those of the feature's own file.
_TESTS_OF_STEPS = {
    "exact_warmup": ("sglang/test_exact_warmup.py", "sglang/test_deep_gemm_rank.py"),
    "start_up_events.py": ("sglang/test_start_up_events.py", "test_server.py"),
    "attn_tp_gather.py": ("sglang/test_attn_tp_gather.py", "sglang/test_hook_tables.py"),
    "hc_prenorm.py": ("sglang/test_hc_prenorm.py", "sglang/test_hc_prenorm_routing.py"),
}


def problem_of(mutant: Mutant) -> str | None:
    """Why a mutant cannot be made from the tree as it is."""
    path = ROOT / PACKAGE / mutant.file
    if not path.is_file():
        return f"{path} is not there"
    if (count := path.read_text(encoding="utf-8").count(mutant.old)) != 1:
        return f"{path}: `{mutant.old.strip()}` is there {count} times, expected once"
    return None


def _passes(tree: Path, tests: tuple[str, ...], limit_s: float) -> tuple[bool, str]:
    """Whether tests pass with the package in `tree`, and what they said. A run that takes too long does not pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *(f"test/{test}" for test in tests)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        said = f"not done after {limit_s:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode not in (0, 1, -signal.SIGKILL):
        # With the package broken at import nothing is collected, which says nothing about the tests.
        raise RuntimeError(f"pytest ended with status {process.returncode}:\n{said}")
    return process.returncode == 0, said


def _verdict(mutant: Mutant, tree: Path, unchanged: dict[tuple[str, ...], bool], limit_s: float) -> str:
    if absent := [test for test in mutant.tests if not (ROOT / "test" / test).is_file()]:
        return f"NOT CAUGHT, there is no test/{absent[0]}"
    if mutant.tests not in unchanged:
        unchanged[mutant.tests], said = _passes(tree, mutant.tests, limit_s)
        if not unchanged[mutant.tests]:
            print(said[-2000:], file=sys.stderr)
    if not unchanged[mutant.tests]:
        return "its tests fail without it"
    path = tree / PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        passed, _ = _passes(tree, mutant.tests, limit_s)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return "error"
    finally:
        path.write_text(text, encoding="utf-8")
    return "NOT CAUGHT" if passed else "caught"


def main() -> int:
    options = argparse.ArgumentParser(description="Break the plugin in one place at a time; do its tests notice?")
    options.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    options.add_argument("--only", default="", metavar="WORD", help="those with this in their name or file")
    options.add_argument("--result", type=Path, metavar="FILE", help="write the verdicts there, as JSON")
    options.add_argument("--limit-s", type=float, default=_ONE_RUN_LIMIT_S, help="of one run of tests")
    chosen = options.parse_args()
    mutants = [each for each in (*LINES, *steps()) if chosen.only in f"{each.name} {each.file}"]
    problems = [f"{each.name}: {problem}" for each in mutants if (problem := problem_of(each))]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    if chosen.list:
        print(*(f"{each.name}  ({each.file})" for each in mutants), sep="\n")
    if chosen.list or problems or not mutants:
        return 2 if problems or not mutants else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    verdicts: dict[str, str] = {}
    unchanged: dict[tuple[str, ...], bool] = {}
    write = functools.partial(json.dumps, indent=1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        shutil.copytree(ROOT / "python", Path(place, "python"))  # links as what they point to
        for number, mutant in enumerate(mutants, 1):
            start = time.monotonic()
            verdicts[mutant.name] = _verdict(mutant, Path(place), unchanged, chosen.limit_s)
            seconds = time.monotonic() - start
            print(f"{number}/{len(mutants)} {verdicts[mutant.name]}: {mutant.name} ({seconds:.0f} s)", flush=True)
            if chosen.result:
                chosen.result.write_text(write(verdicts) + "\n", encoding="utf-8")
    return int(any(verdict != "caught" for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
