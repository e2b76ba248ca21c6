"""`sglang-warmstart compile` as its users run it: a process, what it prints and leaves, and whatever ends it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from kit.compile_runs import (
    OFTEN,
    Machine,
    end,
    left_by,
    numbers,
    on_some,
    read,
    see_whole,
    small_deep_gemm,
    small_plan,
    wait_for,
)
from kit.confined import in_mount_namespace, why_no_mounts
from kit.fake_nvcc import FakeNvcc
from kit.plans import write_plan
from kit.recorded import recording
from kit.scripted_compiler import wait_until_gone
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.signature import PublicKey
from sglang_warmstart.cli import app
from typer.testing import CliRunner

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


# What it does and prints


def test_a_plan_becomes_a_bundle_and_each_kernel_is_a_plain_line(machine: Machine) -> None:
    plan = machine.plan(3)
    ended = machine.run(plan, "--jobs", "1")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == "3 kernels to compile: nvcc 13.0.88, 1 at once, this machine"
    for number, (line, kernel) in enumerate(zip(lines[1:4], (3, 2, 1), strict=True), 1):
        assert re.fullmatch(rf"{number}/3  k{kernel}\.[0-9a-f]{{8}}  \d+\.\d s, 0 KiB", line), line
    assert re.fullmatch(
        rf"3 of 3 kernels in {machine.bundle} \(\d\.\d KiB\): \d\.\d s, the compilers' own seconds add up to \d\.\d",
        lines[4],
    )
    assert len(lines) == 5
    assert "\x1b" not in ended.out
    see_whole(machine, plan, [1, 2, 3])
    assert left_by(machine) == ["bundle.tar.zst"]


def test_for_machines_it_prints_json_and_nothing_else(machine: Machine) -> None:
    ended = machine.run(machine.plan(2), "--json")
    assert ended.status == 0
    report = ended.json
    each = report.pop("each")
    assert report.pop("seconds") >= 0 and report.pop("compile_seconds") == pytest.approx(
        sum(kernel["seconds"] for kernel in each), abs=0.002
    )
    assert report == {
        "bundle": str(machine.bundle),
        "bytes": machine.bundle.stat().st_size,
        "kernels": 2,
        "compiled": 2,
        "resumed": 0,
        "failed": {},
        "interrupted": False,
        "nvcc": "13.0.88",
    }
    assert {kernel["name"] for kernel in each} == read(machine.bundle).cubins.keys()
    assert all(kernel["bytes"] > 64 and kernel["worker"].startswith(f"{os.uname().nodename}:") for kernel in each)
    # The progress goes elsewhere.
    assert "2/2  " in ended.err


def test_one_kernel_that_fails_does_not_keep_the_others_from_the_bundle(machine: Machine) -> None:
    machine.nvcc.on_each_kernel(on_some("2", "echo '[bold]no[/] luck today' >&2; echo more >&2; exit 3"))
    plan = machine.plan(3)
    ended = machine.run(plan)
    assert ended.status == 1
    # One line, as it is: brackets are no markup.
    said = f"{machine.nvcc.path}: exit status 3: [bold]no[/] luck today"
    assert re.search(rf"^\d/3  k2\.[0-9a-f]{{8}}  failed: {re.escape(said)}$", ended.out, re.MULTILINE)
    assert f"2 of 3 kernels in {machine.bundle} " in ended.out
    see_whole(machine, plan, [1, 3])
    ((name, reason),) = read(machine.bundle).failed.items()
    assert (name.split(".")[1], reason.splitlines()[0]) == ("k2", said)
    # The next run tries that one again and nothing else.
    machine.nvcc.on_each_kernel(":")
    report = machine.run(plan, "--json").json
    assert (report["compiled"], report["resumed"], report["failed"]) == (1, 2, {})
    assert machine.compiled() == [1, 2, 2, 3]
    assert read(machine.bundle).failed == {}


def test_if_all_fail_there_is_no_bundle(machine: Machine) -> None:
    machine.nvcc.on_each_kernel("exit 3")
    ended = machine.run(machine.plan(2))
    assert ended.status == 1
    assert ended.out.splitlines()[-1] == "no kernel was compiled: no bundle is written"
    ended = machine.run(machine.plan(2), "--json")
    assert (ended.status, ended.json["bundle"], len(ended.json["failed"])) == (1, None, 2)
    assert left_by(machine) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_compilers_run_at_once_than_jobs(machine: Machine, jobs: int) -> None:
    machine.nvcc.on_each_kernel("sleep 0.2")
    ended = machine.run(machine.plan(6), "--jobs", str(jobs))
    assert ended.status == 0
    assert f", {jobs} at once, " in ended.out
    assert machine.most_at_once() == jobs


# In a terminal


def _in_terminal(machine: Machine, *arguments: str | Path, typed: bytes = b"") -> tuple[int, str]:
    """Status and output in a terminal.

    Args:
        typed: is typed there when two compilers have ended.
    """
    master, slave = pty.openpty()
    environment = {**machine.environment, "COLUMNS": "120", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    command = ["setsid", "--ctty", *machine.command(*arguments, "-o", machine.bundle)]
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    pieces: list[bytes] = []

    def listen() -> None:
        with suppress(OSError):  # how the end of a terminal's output looks on Linux
            while piece := os.read(master, 1 << 16):
                pieces.append(piece)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        if typed:
            wait_for(lambda: len(machine.starts()) > 2)
            os.write(master, typed)
        status = process.wait(60)
    finally:
        process.kill()
        listener.join(10)
        os.close(master)
    return status, b"".join(pieces).decode().replace("\r\n", "\n")


def _without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_in_a_terminal_it_is_a_live_table(machine: Machine) -> None:
    machine.nvcc.on_each_kernel(f"{on_some('2', 'exit 3')}; sleep 0.3")
    status, text = _in_terminal(machine, machine.plan(4), "--jobs", "1")
    assert status == 1
    assert "\x1b[?25l" in text and text.count("\x1b[?25h") == text.count("\x1b[?25l"), "the cursor comes back"
    frames = _without_escapes(text).split("kernels ━")
    assert len(frames) > 4, "it is drawn again and again"
    assert any(re.search(r"1 compiled in \d s of compilers, 0 failed", frame) for frame in frames)
    assert re.search(r"3 compiled in [1-9] s of compilers, 1 failed", frames[-1])
    rows = re.findall(r"^ *(k\d)\.[0-9a-f]{8} +(compiled|failed) *([\d.]*)", frames[-2], re.MULTILINE)
    assert [(name, state, bool(seconds)) for name, state, seconds in rows[-4:]] == [
        ("k4", "compiled", True),
        ("k3", "compiled", True),
        ("k2", "failed", False),
        ("k1", "compiled", True),
    ]
    assert re.search(r"failed: k2\.[0-9a-f]{8}: .*exit status 3: it said nothing", text)
    assert f"3 of 4 kernels in {machine.bundle}" in text


def test_in_a_terminal_json_is_still_json(machine: Machine) -> None:
    status, text = _in_terminal(machine, machine.plan(2), "--json")
    assert status == 0
    text = _without_escapes(text)
    assert msgspec.json.decode(text[text.index("{\n") :])["compiled"] == 2


def test_ctrl_c_in_a_terminal_ends_the_compilers_and_keeps_what_is_done(machine: Machine) -> None:
    machine.nvcc.on_each_kernel(on_some("1 2", "sleep 1000 & wait"))
    plan = machine.plan(4)
    status, text = _in_terminal(machine, plan, "--jobs", "1", typed=b"\x03")
    assert status == 130
    assert f"interrupted: 2 of 4 kernels are in {machine.bundle}; the same command goes on from there" in text
    assert "Traceback" not in text
    assert "\x1b[?25h" in text, "the cursor comes back"
    assert wait_until_gone(machine.starts()) == []
    see_whole(machine, plan, [3, 4])


# It goes on where it was


def test_a_signal_in_the_middle_keeps_what_is_done_and_the_same_command_goes_on(machine: Machine) -> None:
    machine.nvcc.on_each_kernel(on_some("1 2", "sleep 1000 & wait"))
    plan = machine.plan(5)
    process = machine.start(plan, "--jobs", "2", "--json")
    wait_for(lambda: len(machine.starts()) == 5)
    time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert time.monotonic() - begun < 5
    assert (ended.status, ended.json["interrupted"], ended.json["compiled"]) == (130, True, 3)
    assert "Traceback" not in ended.err
    assert wait_until_gone(machine.starts()) == [], "a compiler runs on"
    see_whole(machine, plan, [3, 4, 5])
    assert left_by(machine) == ["bundle.tar.zst"]

    machine.nvcc.on_each_kernel(":")
    ended = machine.run(plan)
    assert ended.status == 0
    assert ended.out.startswith("2 kernels to compile, 3 are there already: ")
    # Each once, but for the two that were cut off.
    assert machine.compiled() == [1, 1, 2, 2, 3, 4, 5]
    see_whole(machine, plan, [1, 2, 3, 4, 5])


def test_a_signal_before_anything_is_done_leaves_nothing(machine: Machine) -> None:
    machine.nvcc.on_each_kernel("sleep 1000 & wait")
    process = machine.start(machine.plan(2))
    wait_for(machine.starts)
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert (ended.status, ended.out.splitlines()[-1]) == (130, "interrupted: 0 of 2 kernels")
    assert wait_until_gone(machine.starts()) == []
    assert left_by(machine) == []


def test_if_its_reader_goes_away_what_is_done_is_kept(machine: Machine) -> None:
    machine.nvcc.on_each_kernel("sleep 0.1")
    plan = machine.plan(6)
    process = machine.start(plan, "--jobs", "1")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read() if process.stderr else "") == (130, "")
    done = numbers(read(machine.bundle))
    assert 1 <= len(done) < 6
    assert wait_until_gone(machine.starts()) == []
    machine.nvcc.on_each_kernel(":")
    assert machine.run(plan, "--json").json["resumed"] == len(done)
    see_whole(machine, plan, [1, 2, 3, 4, 5, 6])


def test_a_run_with_nothing_to_do_compiles_nothing_and_keeps_the_bundle(machine: Machine) -> None:
    plan = machine.plan(2)
    assert machine.run(plan).status == 0
    before = machine.bundle.read_bytes()
    ended = machine.run(plan)
    assert (ended.status, ended.out.splitlines()[0][:50]) == (0, "0 kernels to compile, 2 are there already: nvcc 13")
    assert machine.bundle.read_bytes() == before
    assert machine.compiled() == [1, 2]


# Another thread takes a signal that is masked in this one alone.
_SLOW_WRITE = """
import os, threading, time
from pathlib import Path
from sglang_warmstart.bundle import archive
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
before = archive.write
def write(*args, **kwargs):
    Path(os.environ["WRITES"]).touch()
    time.sleep(1)
    before(*args, **kwargs)
archive.write = write
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_last_bundle_is_written_does_not_keep_it_from_being_written(
    machine: Machine, number: signal.Signals
) -> None:
    writes = machine.directory / "writes"
    plan = machine.plan(2)
    process = machine.start(plan, before=_SLOW_WRITE, WRITES=str(writes))
    wait_for(writes.exists)
    process.send_signal(number)
    ended = end(process)
    assert (ended.status, ended.err) == (130, "interrupted\n")
    see_whole(machine, plan, [1, 2])


def test_what_was_done_some_time_ago_outlives_a_kill(machine: Machine) -> None:
    machine.nvcc.on_each_kernel(on_some("1", "sleep 1000 & wait"))
    plan = machine.plan(4)
    process = machine.start(plan, "--jobs", "1", before=OFTEN)
    try:
        wait_for(
            lambda: len(machine.starts()) == 4 and machine.bundle.exists() and len(read(machine.bundle).cubins) == 3
        )
        process.kill()
        assert end(process).status == -signal.SIGKILL
        see_whole(machine, plan, [2, 3, 4])
        machine.nvcc.on_each_kernel(":")
        assert machine.run(plan).status == 0
        assert machine.compiled() == [1, 1, 2, 3, 4]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was seen to have gone by then
            os.killpg(machine.starts()[3], signal.SIGKILL)


def test_it_is_not_written_anew_for_each_kernel(machine: Machine) -> None:
    count = "import os\nfrom sglang_warmstart.bundle import archive\nwas = archive.write\n"
    count += 'archive.write = lambda *a, **k: (open(os.environ["WRITES"], "a").write("x"), was(*a, **k))\n'
    writes = machine.directory / "writes"
    assert machine.run(machine.plan(20), before=count, WRITES=str(writes)).status == 0
    assert writes.read_text() == "x"


def test_two_at_once_on_the_same_bundle_both_end_and_it_is_whole(machine: Machine) -> None:
    machine.nvcc.on_each_kernel("sleep 0.1")
    plan = machine.plan(6)
    processes = [machine.start(plan, "--jobs", "1", before=OFTEN) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        if machine.bundle.exists():
            read(machine.bundle)
        time.sleep(0.05)
    assert [end(process).status for process in processes] == [0, 0]
    see_whole(machine, plan, [1, 2, 3, 4, 5, 6])
    assert left_by(machine) == ["bundle.tar.zst"]


# Several plans, and other bundles in its place


def test_several_plans_become_one_bundle_and_what_they_share_is_compiled_once(machine: Machine) -> None:
    first, second = machine.plan(3), machine.plan(3, "second.json", first=2, launch="1")
    ended = machine.run(first, second)
    assert ended.status == 0
    manifest = read(machine.bundle)
    assert numbers(manifest) == machine.compiled() == [1, 2, 3, 4]
    assert [launch.launch for launch in manifest.plan.launches] == [{"rank": "0"}, {"rank": "1"}]


def test_what_a_bundle_shares_with_a_larger_plan_is_kept(machine: Machine) -> None:
    assert machine.run(machine.plan(2)).status == 0
    plan = machine.plan(4, "larger.json")
    assert machine.run(plan).status == 0
    assert machine.compiled() == [1, 2, 3, 4]
    see_whole(machine, plan, [1, 2, 3, 4])


def _refused(machine: Machine, *arguments: str | Path, prefix: tuple[str, ...] = ()) -> str:
    """The line that it says when nothing is compiled and nothing is changed. In this process, if without a prefix."""
    before = machine.bundle.read_bytes() if machine.bundle.is_file() else None
    runs = len(machine.starts())
    arguments = (*arguments, *(() if "-o" in arguments else ("-o", machine.bundle)))
    if prefix:
        command = [*prefix, *machine.command(*arguments)]
        done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tempfile.tempdir", None)
            patch.syspath_prepend(machine.directory)
            result = CliRunner().invoke(app, ["compile", *map(str, arguments)], env=machine.environment)
        status, out, err = result.exit_code, result.stdout, result.stderr
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert len(machine.starts()) == runs
    assert (machine.bundle.read_bytes() if machine.bundle.is_file() else None) == before
    assert not list(machine.temporary.iterdir())
    return line


def test_a_bundle_of_another_compiler_or_other_headers_is_not_gone_on_with(machine: Machine, tmp_path: Path) -> None:
    plan = machine.plan(2)
    assert machine.run(plan).status == 0
    version = recording().compiler.replace("V13.0.88", "V13.0.99")
    for other in (
        machine.plan(2, "compiler.json", compiler=version),
        write_plan(tmp_path / "headers.json", small_plan(small_deep_gemm(tmp_path, "// 2\n"), 2)),
    ):
        assert _refused(machine, other) == (
            f"{machine.bundle} is there, and is not gone on with: of another compiler or another DeepGEMM: "
            "remove it first"
        )
    see_whole(machine, plan, [1, 2])


def test_a_bundle_of_a_plan_that_has_nothing_in_common_is_not_lost(machine: Machine) -> None:
    plan = machine.plan(2)
    assert machine.run(plan).status == 0
    assert _refused(machine, machine.plan(2, "other.json", first=3)) == (
        f"{machine.bundle} is there, and is not gone on with: of another plan, it has no kernel of this one: "
        "remove it first"
    )
    see_whole(machine, plan, [1, 2])


@pytest.mark.parametrize("content", [b"", b"no bundle", b"half"])
def test_a_file_that_is_no_bundle_is_left_as_it_is(machine: Machine, content: bytes) -> None:
    plan = machine.plan(2)
    if content == b"half":
        assert machine.run(plan).status == 0
        content = machine.bundle.read_bytes()[:-100]
    machine.bundle.write_bytes(content)
    line = _refused(machine, plan)
    assert line.startswith(f"{machine.bundle} is there, and is not gone on with: ")
    assert line.endswith(": remove it first")


# What it refuses


def test_a_machine_that_is_not_what_the_plan_asks_for_compiles_nothing(machine: Machine, tmp_path: Path) -> None:
    plan = machine.plan(2)
    other = FakeNvcc(tmp_path / "other")
    (other.path.parent / "version").write_text(recording().compiler.replace("V13.0.88", "V13.0.99"))
    assert _refused(machine, plan, "--nvcc", other.path) == (
        f"the plan is for nvcc 13.0.88, {other.path} is nvcc 13.0.99: "
        "install what `plan requirements` says, or record the plan anew"
    )
    assert not other.runs
    headers = small_deep_gemm(tmp_path, "// 2\n")
    line = _refused(machine, plan, "--deep-gemm", headers)
    assert re.match(r"the plan is for sgl-deep-gemm 0\.1\.0 \(headers [0-9a-f]{12}\), ", line)
    assert re.search(r" \(headers [0-9a-f]{12}\): install the one of the plan", line)
    assert "is not there, or is no program" in _refused(machine, plan, "--nvcc", "/nowhere/nvcc")
    assert "no include/deep_gemm" in _refused(machine, plan, "--deep-gemm", "/nowhere")


def test_plans_of_different_compilers_do_not_become_one_bundle(machine: Machine) -> None:
    version = recording().compiler.replace("13.0", "13.1")
    plan, other = machine.plan(2), machine.plan(2, "other.json", compiler=version)
    line = _refused(machine, plan, other)
    assert line.startswith(f"{plan} and {other} are not of the same compiler: Build cuda_13.0")
    assert "Build cuda_13.1" in line and line.endswith(": compile them one by one")


_DEEP = b'{"format": 1, "x": ' + b"[" * 200_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a plan: Input data was truncated"),
        (b"\0" * 100, "not a plan: JSON is malformed"),
        (b"[]", "not a plan: Expected `object`"),
        (b'{"format": 2}', "a plan of format 2, this version reads format 1"),
        (b'{"format": 1}', "not a plan: Object missing required field"),
        (_DEEP, "not a plan: maximum recursion depth"),
        (b'{"format": 1, "deep_gemm": "\xff"}', "not a plan: "),
        (b'{"format": 99999999999999999999}', "a plan of format 99999999999999999999"),
    ],
    ids=["empty", "zeros", "a list", "format 2", "half", "deep", "no text", "a large number"],
)
def test_what_is_no_plan_is_one_line(machine: Machine, content: bytes, reason: str) -> None:
    path = machine.directory / "plan.json"
    path.write_bytes(content)
    assert _refused(machine, path).startswith(f"{path}: {reason}")


def test_a_plan_that_was_changed_by_hand_is_refused(machine: Machine) -> None:
    plan = machine.plan(2)
    plan.write_bytes(plan.read_bytes().replace(b"// 2", b"// 7"))
    assert _refused(machine, plan).endswith(": its source or its flags are not those that it was named for")


def test_a_plan_that_cannot_be_read_is_one_line(machine: Machine) -> None:
    assert _refused(machine, "/nowhere/plan.json") == "/nowhere/plan.json: No such file or directory"
    assert _refused(machine, machine.directory) == f"{machine.directory}: Is a directory"


def test_a_huge_plan_is_not_read_to_its_end(machine: Machine) -> None:
    huge = machine.directory / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    assert _refused(machine, huge) == f"{huge}: not a plan: more than {256 << 20} bytes"
    # Nor one whose size is nowhere said.
    assert _refused(machine, "/dev/zero") == f"/dev/zero: not a plan: more than {256 << 20} bytes"


def test_a_key_that_is_not_there_is_said_before_anything_is_compiled(machine: Machine) -> None:
    assert "/nowhere.pem cannot be read" in _refused(machine, machine.plan(2), "--sign", "/nowhere.pem")


@pytest.mark.parametrize("output", ["nowhere/bundle.tar.zst", "plan.json/bundle.tar.zst"])
def test_a_directory_that_is_not_there_is_said_before_anything_is_compiled(machine: Machine, output: str) -> None:
    path = machine.directory / output
    assert re.fullmatch(
        rf"{path} cannot be written \((No such file or|Not a) directory\): name another place",
        _refused(machine, machine.plan(2), "-o", path),
    )


# The disk


@needs_mounts
def test_a_directory_that_cannot_be_written_is_said_before_anything_is_compiled(machine: Machine) -> None:
    plan = machine.plan(2)
    assert machine.run(plan).status == 0
    place = shlex.quote(str(machine.bundle.parent))
    line = _refused(
        machine, machine.plan(3, "larger.json"), prefix=in_mount_namespace(f"mount -B -o ro {place} {place}")
    )
    assert line == f"{machine.bundle} cannot be written (Read-only file system): name another place"
    see_whole(machine, plan, [1, 2])


@needs_mounts
def test_a_full_disk_is_said_and_leaves_the_bundle_that_was_there(machine: Machine) -> None:
    place, copy = shlex.quote(str(machine.bundle.parent)), shlex.quote(str(machine.directory / "copy"))
    old, plan = machine.plan(1), machine.plan(2, "larger.json")
    assert machine.run(old).status == 0
    bundle = machine.bundle.read_bytes()
    setup = (
        f"cp {place}/bundle.tar.zst {copy}; mount -t tmpfs -o size=32k none {place}; cp {copy} {place}/bundle.tar.zst; "
        f"head -c 1M /dev/zero > {place}/full 2> /dev/null || true"
    )
    script = f'{setup}\n"$@" || echo "status $?"; rm {place}/full; ls {place}; cat {place}/bundle.tar.zst > {copy}'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-ec", script, "sh"]
    command += machine.command(plan, "-o", machine.bundle)
    done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == (
        f"{machine.bundle} cannot be written (No space left on device): make room, or name another place\n"
    )
    assert done.stdout.splitlines()[-2:] == ["status 2", "bundle.tar.zst"]
    assert (machine.directory / "copy").read_bytes() == bundle


# Signed


def test_a_signed_bundle_verifies_also_after_it_was_gone_on_with(machine: Machine) -> None:
    pytest.importorskip("cryptography")
    private, public = machine.directory / "private.pem", machine.directory / "public.pem"
    _write_keys(private, public)
    for count in (2, 3):
        assert machine.run(machine.plan(count), "--sign", private).status == 0
        with machine.bundle.open("rb") as file:
            manifest = archive.read(file, is_signed_by=PublicKey.load(public))
        assert len(manifest.cubins) == count
    assert machine.compiled() == [1, 2, 3]


def _write_keys(private: Path, public: Path) -> None:
    from cryptography.hazmat.primitives import serialization as kinds
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private.write_bytes(key.private_bytes(kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(kinds.Encoding.PEM, kinds.PublicFormat.SubjectPublicKeyInfo))


# The real compilers
