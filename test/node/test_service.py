"""What ranks ask of the service of their node, and what they get: a real process, real compiler commands."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.fake_nvcc import cubin_of
from kit.node import GPU, Node, Place, wait_until
from kit.standin_library import FLAGS, LINE_INFO, TAKEN_GPU, definition, kernels_of
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.marker import Marker
from sglang_warmstart.deepgemm.record import child as recording
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node import pool, protocol
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.protocol import Answer, Restore, Warm, Warmed, Welcome

PLENTY = 100 << 30
FORKSERVER = "multiprocessing.forkserver"


def target(kernel_type: str = "GEMM_NT_F8F8BF16", *, n: int = 2112, k: int = 7168, m_max: int = 150) -> Target:
    return Target(kernel_type=kernel_type, n=n, k=k, num_groups=1, num_sms=132, m_max=m_max)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A service that outlives many conversations: each with a cache of its own."""
    with Node(tmp_path_factory.mktemp("node"), DG_JIT_WITH_LINEINFO="1") as node:
        yield node


def warm(client: ServiceClient, *targets: Target, limit_s: float = 30.0) -> Answer:
    return client.warm(targets, PLENTY, limit_s, searched=True)


def defined(*targets: Target) -> tuple[Warmed, ...]:
    return tuple(Warmed(each, definition(each)) for each in targets)


def sources_of(*targets: Target) -> dict[str, str]:
    return {
        kernel.directory: kernel.source for each in targets for m in each.m_values for kernel in kernels_of(each, m)
    }


def once_each(*targets: Target) -> dict[str, int]:
    """What a compiler ran for, if it compiled each kernel of the targets once."""
    return {source.splitlines()[0]: 1 for source in sources_of(*targets).values()}


# A round trip


def test_a_rank_gets_the_kernels_of_its_targets_when_they_are_in_the_cache(node: Node, place: Place) -> None:
    asked = (target(n=2112), target(n=512))
    answer = warm(place.rank(node), *asked)
    assert answer == Answer(defined(*asked), compiled=len(sources_of(*asked)))
    for directory, source in sources_of(*asked).items():
        assert (place.cache.path(directory) / "kernel.cu").read_bytes() == source.encode()
        assert (place.cache.path(directory) / "kernel.cubin").read_bytes() == cubin_of(source, FLAGS)
    assert {path.name for path in place.cache.path("").iterdir()} == sources_of(*asked).keys()
    assert list((place.cache.root / "tmp").iterdir()) == []
    assert place.nvcc.compiled == once_each(*asked)


def test_what_is_announced_is_worked_on_before_anybody_asks(node: Node, place: Place) -> None:
    rank = place.rank(node)
    rank.announce([target()], PLENTY)
    assert wait_until(lambda: all(place.cache.has(directory) for directory in sources_of(target())))
    assert warm(rank, target()).targets == defined(target())
    assert place.nvcc.compiled == once_each(target())


def test_what_could_not_be_had_before_there_was_a_rank_is_tried_again_for_it(node: Node, place: Place) -> None:
    mended = place.directory / "mended"
    place.nvcc.on_each_kernel(f"[ -e {mended} ] || {{ until [ -e {mended} ]; do sleep 0.05; done; exit 7; }}")
    node.client().expect(place.hello(), [target()])
    assert wait_until(lambda: place.nvcc.compiled)
    rank = place.rank(node)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(warm, rank, target())
        time.sleep(0.5)  # for it to be asked
        mended.touch()
        assert answer.result().targets == defined(target())


def test_a_restart_restores_from_the_marker_and_neither_records_nor_compiles(
    node: Node, place: Place, tmp_path: Path
) -> None:
    asked = (target(n=512), target(n=2112))
    first = place.rank(node)
    assert first.restore() == Answer(())
    warm(first, asked[0])
    warm(first, asked[1])
    runs = place.nvcc.runs
    with Node(tmp_path, library="a_library_that_is_not_there") as restarted:
        rank = place.rank(restarted)
        assert rank.restore() == Answer(defined(*asked), known=True)
        assert not restarted.is_running(FORKSERVER)
        assert place.nvcc.runs == runs
        # Another launch has no marker of its own, but the kernels are known.
        other = place.rank(restarted, place.hello(launch={"model": "another one with the same GEMM"}))
        assert other.restore() == Answer(())
        assert warm(other, *asked) == Answer(defined(*asked))
    assert place.nvcc.compiled == once_each(*asked)


def test_a_cache_that_others_can_write_is_not_used_and_nothing_in_it_is_touched(
    node: Node, place: Place, tmp_path: Path
) -> None:
    warm(place.rank(node), target())
    runs, before = place.nvcc.runs, sorted(place.cache.root.rglob("*"))
    (place.cache.root / "warmstart").chmod(0o777)
    client = node.client()
    problem = client.hello(place.hello()).problem
    assert problem.startswith(f"{place.cache.root}/warmstart can be written by every user (mode 0777), ")
    assert "\n" not in problem
    with pytest.raises(ServiceGoneError, match="say Hello first"):
        client.restore()
    assert (place.nvcc.runs, sorted(place.cache.root.rglob("*"))) == (runs, before)
    with Node(tmp_path, SGLANG_WARMSTART_SHARED_CACHE="1") as trusting:
        assert place.rank(trusting).restore().known


def test_a_launch_without_targets_is_known_from_then_on(node: Node, place: Place) -> None:
    rank = place.rank(node)
    assert rank.restore() == Answer(())
    assert warm(rank) == Answer(())
    assert rank.restore() == Answer((), known=True)
    assert place.rank(node, place.hello(launch={"rank": "1"})).restore() == Answer(())
    # What is met later is added.
    warm(rank, target())
    assert rank.restore() == Answer(defined(target()), known=True)


def test_what_is_asked_for_before_anybody_has_searched_is_restored_and_searched_for_all_the_same(
    node: Node, place: Place
) -> None:
    # mHC's targets are, while weights load.
    rank = place.rank(node)
    rank.warm([target(n=512)], PLENTY, 30)
    assert rank.restore() == Answer(defined(target(n=512)))
    warm(rank, target(n=2112))
    assert rank.restore() == Answer(defined(target(n=512), target(n=2112)), known=True)
    # What a forward meets later does not undo that.
    rank.warm([target(n=64)], PLENTY, 30)
    assert rank.restore().known


def test_without_a_marker_the_service_gets_ready_to_record_before_it_is_asked_to(place: Place, tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        assert not node.is_running(FORKSERVER)
        place.rank(node)
        assert wait_until(lambda: node.is_running(FORKSERVER))
        assert wait_until(lambda: place.nvcc.runs == {"stub": 1})


def test_a_damaged_marker_is_reported_and_the_work_is_done_again(node: Node, place: Place) -> None:
    rank = place.rank(node)
    warm(rank, target())
    (marker,) = place.cache.own.glob("markers/*/*.json")
    marker.write_bytes(marker.read_bytes()[:-100])
    answer = rank.restore()
    assert answer.targets == ()
    assert "the marker is not used" in answer.notes[0]
    assert "damaged" in answer.notes[0]


def test_what_is_wrong_with_a_marker_is_said_once(node: Node, place: Place) -> None:
    warm(place.rank(node), target())
    (marker,) = place.cache.own.glob("markers/*/*.json")
    marker.unlink()
    os.mkfifo(marker)  # who reads it waits for us
    # The service looks at it when the rank has said hello, and when it asks, which it does meanwhile.
    rank = place.rank(node)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(rank.restore)
        time.sleep(0.5)
        marker.open("wb").close()
        (note,) = (*asked.result(30).notes, *rank.restore().notes)
    assert "the marker is not used" in note


def test_half_a_kernel_stays_where_it_is_and_is_completed_when_a_target_needs_it(node: Node, place: Place) -> None:
    (half, *_) = sources_of(target())
    halves = [place.cache.path(name) for name in (half, f"kernel.gemm.{1:032x}")]
    for path in halves:
        path.mkdir(parents=True)
        (path / "kernel.cu").touch()  # as a DeepGEMM of 2025 leaves it while it compiles
    inodes = [path.stat().st_ino for path in halves]
    assert warm(place.rank(node), target()).targets == defined(target())
    assert [path.stat().st_ino for path in halves] == inodes
    assert [place.cache.has(path.name) for path in halves] == [True, False]


def test_only_the_ranks_own_settings_reach_deep_gemm(node: Node, place: Place) -> None:
    # The process that started the service has DG_JIT_WITH_LINEINFO=1.
    assert warm(place.rank(node), target()).targets == defined(target())
    answer = warm(place.rank(node, place.hello(DG_JIT_WITH_LINEINFO="1")), target())
    (source, *_) = sources_of(target()).values()
    cubins = [(place.cache.path(use.directory) / "kernel.cubin").read_bytes() for use in answer.targets[0].kernels]
    assert cubin_of(source, FLAGS + LINE_INFO) in cubins


# Plans


def test_for_a_plan_kernels_are_recorded_and_none_is_compiled(place: Place, tmp_path: Path) -> None:
    asked = (target(n=512), target(n=2112))
    (tmp_path / "plans").mkdir()
    with Node(tmp_path, plans=tmp_path / "plans") as node:
        rank = node.client()
        assert rank.hello(place.hello()) == Welcome(only_plans=True)
        rank.announce(asked[:1], PLENTY)
        assert rank.restore() == Answer(())
        assert warm(rank, asked[0]) == Answer(defined(asked[0]))
        assert warm(rank, asked[1]) == Answer(defined(asked[1]))
    assert place.nvcc.runs == {"stub": 1}
    assert not place.cache.path("").exists()
    assert not list(place.cache.own.glob("markers/*/*.json"))
    plan = only_plan_in(tmp_path / "plans")
    (launch,) = plan.launches
    assert (launch.gpu, launch.num_sms, launch.launch) == (GPU.name, GPU.num_sms, place.hello().launch)
    include = Path("/opt/deep_gemm/include")
    found = plan.targets_of(launch, include, plan.directories(include))
    assert {each.target: each.kernels for each in found} == {each: definition(each) for each in asked}
    assert {plan.flags_of(name, include) for name in plan.kernels} == {FLAGS}
    assert {kernel.source for kernel in plan.kernels.values()} == set(sources_of(*asked).values())


def only_plan_in(directory: Path) -> plans.Plan:
    (path,) = directory.glob("*.json")
    return plans.decode(path.read_bytes())


def test_a_plan_says_which_targets_are_not_in_it(place: Place, tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    with Node(tmp_path, plans=tmp_path / "plans") as node:
        rank = node.client()
        rank.hello(place.hello())
        rank.left_out("<PACKED> N=1 K=2", "packed scales")
        broken = target("a GEMM that raises at 33")
        answer = warm(rank, broken, target())
        assert [bool(each.error) for each in answer.targets] == [True, False]
    plan = only_plan_in(tmp_path / "plans")
    assert {(each.target, each.reason) for each in plan.left_out} == {
        ("<PACKED> N=1 K=2", "packed scales"),
        (str(broken), answer.targets[0].error),
    }
    assert [each.target for each in plan.launches[0].targets] == [target()]


def test_a_plan_that_cannot_be_written_is_a_note_in_the_answer(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Node(tmp_path, plans=tmp_path / "file") as node:
        rank = node.client()
        rank.hello(place.hello())
        answer = warm(rank, target())
    assert answer.targets == defined(target())
    assert "the plan cannot be written" in answer.notes[0]


def test_what_is_left_out_of_no_plan_is_no_matter(node: Node, place: Place) -> None:
    rank = place.rank(node)
    rank.left_out("a target", "a reason")
    assert rank.restore() == Answer(())


def test_a_marker_has_the_flags_of_its_targets(node: Node, place: Place) -> None:
    warm(place.rank(node), target())
    # One that another marker knows keeps them.
    warm(place.rank(node, place.hello(launch={"rank": "1"})), target())
    markers = [msgspec.json.decode(path.read_bytes(), type=Marker) for path in place.cache.own.glob("markers/*/*.json")]
    assert [[each.flags for each in marker.targets] for marker in markers] == [[(FLAGS,)]] * 2


# Restoring


@contextlib.contextmanager
def somebody_restores(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock until it ends."""
    holding = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)\n"
    holding += "sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", holding, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_kernels_that_are_being_restored_are_waited_for_and_not_compiled(
    node: Node, place: Place, tmp_path: Path
) -> None:
    warm(place.rank(node), target())
    runs = place.nvcc.runs
    aside = place.cache.root.with_name("aside")
    place.cache.root.rename(aside)
    with somebody_restores(tmp_path / "lock") as process, Node(tmp_path, restoring=tmp_path / "lock") as restarted:
        rank = place.rank(restarted)
        with ThreadPoolExecutor() as threads:
            marker = threads.submit(rank.restore)
            other = place.rank(restarted, place.hello(launch={"rank": "7"}))
            kernels = threads.submit(warm, other, target())
            time.sleep(0.5)
            assert not marker.done() and not kernels.done()
            aside.rename(place.cache.root)
            process.stdin.close()  # type: ignore[union-attr]
            assert marker.result(10) == Answer(defined(target()), known=True)
            assert kernels.result(10) == Answer(defined(target()))
    assert place.nvcc.compiled == {what: count for what, count in runs.items() if what != "stub"}


def test_one_who_restores_and_is_killed_keeps_nobody_waiting(place: Place, tmp_path: Path) -> None:
    with somebody_restores(tmp_path / "lock") as process, Node(tmp_path, restoring=tmp_path / "lock") as node:
        rank = place.rank(node)
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(warm, rank, target())
            time.sleep(0.3)
            process.kill()
            assert answer.result(20).targets == defined(target())


# Many at once


def test_sixteen_ranks_at_once_share_the_work(node: Node, place: Place) -> None:
    shapes = [target(n=n, k=k) for n in (512, 2112) for k in (512, 7168)]
    # Each asks for three of four targets, in an order of its own.
    asked = [(shapes * 2)[number % 4 :][:3] for number in range(16)]

    def ask(number: int) -> Answer:
        rank = place.rank(node, place.hello(launch={"rank": str(number)}))
        return warm(rank, *asked[number])

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(16)))
    assert [answer.targets for answer in answers] == [defined(*each) for each in asked]
    assert [answer.notes for answer in answers] == [()] * 16
    assert place.nvcc.compiled == once_each(*shapes)


def test_two_services_on_one_cache_share_the_work(node: Node, place: Place, tmp_path: Path) -> None:
    place.nvcc.on_each_kernel("sleep 0.05")
    with Node(tmp_path) as other, ThreadPoolExecutor() as threads:
        ranks = [place.rank(node), place.rank(other)]
        answers = list(threads.map(lambda rank: warm(rank, target(), target(n=512)), ranks))
    assert [answer.targets for answer in answers] == [defined(target(), target(n=512))] * 2
    assert sum(answer.compiled for answer in answers) == len(sources_of(target(), target(n=512)))
    assert place.nvcc.compiled == once_each(target(), target(n=512))


def test_ranks_with_different_gpus_share_kernels_but_no_marker(node: Node, place: Place) -> None:
    smaller = msgspec.structs.replace(GPU, name="NVIDIA H20", num_sms=78)
    ranks = [place.rank(node), place.rank(node, place.hello(gpu=smaller))]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda rank: warm(rank, target()), ranks))
    assert [answer.targets for answer in answers] == [defined(target())] * 2
    assert place.nvcc.compiled == once_each(target())
    assert len({path.parent for path in place.cache.own.glob("markers/*/*.json")}) == 2


def test_a_rank_that_says_hello_again_is_another_one_from_then_on(node: Node, place: Place, tmp_path: Path) -> None:
    elsewhere = Place(tmp_path / "elsewhere")
    rank = place.rank(node)
    warm(rank, target())
    assert rank.hello(elsewhere.hello()) == Welcome()
    assert rank.restore() == Answer(())
    assert warm(rank, target()).targets == defined(target())
    assert elsewhere.nvcc.compiled == once_each(target())


# What goes wrong in a rank


def frames(*messages: protocol.Message) -> bytes:
    return b"".join(map(protocol.encode, messages))


@contextlib.contextmanager
def raw_connection(node: Node) -> Iterator[socket.socket]:
    node.client()  # it listens
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(node.socket))
        yield connection


def read_answer(connection: socket.socket) -> protocol.Message:
    length = protocol.length_of(connection.recv(protocol.LENGTH.size, socket.MSG_WAITALL))
    return protocol.decode(connection.recv(length, socket.MSG_WAITALL))


def test_a_rank_that_dies_while_it_waits_does_no_harm_to_others(node: Node, place: Place) -> None:
    # Nothing is compiled before there is a file.
    place.nvcc.on_each_kernel(f"until [ -e {place.directory}/go ]; do sleep 0.01; done")
    rank = place.rank(node)
    question = frames(place.hello(), Warm((target(),), PLENTY, 30))
    dying = "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
    dying += "s.sendall(sys.stdin.buffer.read()); print(flush=True); time.sleep(1000)"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", dying, str(node.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(question)
        process.stdin.close()
        process.stdout.readline()
        assert wait_until(lambda: place.nvcc.runs["stub"])  # it is being served
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(warm, rank, target())
            process.send_signal(signal.SIGKILL)
            process.wait()
            (place.directory / "go").touch()
            assert answer.result().targets == defined(target())
    assert place.nvcc.compiled == once_each(target())
    assert warm(place.rank(node), target(n=512)).targets == defined(target(n=512))


@pytest.mark.parametrize(
    ("sent", "is_all"),
    [
        (b"\0\0\0\5hello", False),
        (protocol.LENGTH.pack(protocol.LIMIT + 1), False),
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (frames(Answer(())), False),
        (frames(Welcome()), False),
        (protocol.LENGTH.pack(100) + b"no more", True),
        (b"\0\0", True),
        (b"", True),
    ],
    ids=["no message", "too long", "http", "an answer", "a welcome", "cut off", "half a length", "nothing"],
)
def test_what_is_no_question_closes_the_connection_and_no_other(
    node: Node, place: Place, sent: bytes, is_all: bool
) -> None:
    rank = place.rank(node)
    with raw_connection(node) as connection:
        connection.sendall(frames(place.hello()))
        assert read_answer(connection) == Welcome()
        connection.sendall(sent)
        if is_all:
            connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert rank.restore() == Answer(())
    assert "Traceback" not in node.log


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_whatsoever_end_the_service(node: Node, sent: bytes) -> None:
    with raw_connection(node) as connection:
        connection.sendall(protocol.LENGTH.pack(len(sent)) + sent)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_a_question_before_hello_is_not_answered_but_with_what_is_missing(node: Node) -> None:
    with pytest.raises(ServiceGoneError, match="the service does not answer a Restore, it says: say Hello first"):
        node.client().restore()


def test_an_announcement_before_hello_has_no_answer_that_would_be_taken_for_another(node: Node, place: Place) -> None:
    rank = node.client()
    rank.announce([target()], PLENTY)
    assert rank.hello(place.hello()) == Welcome()
    assert place.nvcc.runs == {}


def test_a_slow_rank_is_understood_and_keeps_nobody_waiting(node: Node, place: Place) -> None:
    with raw_connection(node) as connection:
        for byte in frames(place.hello(), Restore())[:-1]:
            connection.sendall(bytes([byte]))
        assert warm(place.rank(node), target()).targets == defined(target())
        connection.sendall(frames(Restore())[-1:])
        assert read_answer(connection) == Welcome()
        assert read_answer(connection) == Answer(defined(target()), known=True)


def test_a_rank_that_does_not_read_its_answers_keeps_nobody_waiting(node: Node, place: Place) -> None:
    rank = place.rank(node)
    warm(rank, target())
    with raw_connection(node) as connection:
        connection.settimeout(0.5)
        connection.sendall(frames(place.hello()))
        with contextlib.suppress(TimeoutError):  # until the service reads no more of it
            while True:
                connection.sendall(frames(*[Restore()] * 100))
        assert rank.restore() == Answer(defined(target()), known=True)


# What goes wrong on the way to a kernel


def test_a_target_that_takes_too_long_is_ready_for_a_later_question(node: Node, place: Place) -> None:
    place.nvcc.on_each_kernel(f"until [ -e {place.directory}/go ]; do sleep 0.01; done")
    rank = place.rank(node)
    assert warm(rank, target(), limit_s=0.2).targets == (
        Warmed(target(), error="not ready after 0.2 s", not_ready=True),
    )
    (place.directory / "go").touch()
    assert warm(rank, target()).targets == defined(target())
    assert place.nvcc.compiled == once_each(target())


def test_a_compiler_that_fails_spoils_its_target_alone_and_is_tried_again(node: Node, place: Place) -> None:
    bad, good = target(n=512, m_max=64), target(n=2112)
    place.nvcc.on_each_kernel(
        'if grep -q 32x64 "$source"; then echo "kernel.cu(7): error: no such luck" >&2; exit 2; fi'
    )
    rank = place.rank(node)
    first, second = warm(rank, bad, good).targets
    (directory,) = (name for name, source in sources_of(bad).items() if "32x64" in source)
    assert first == Warmed(
        bad,
        error=f"{directory}: standin_gemm: {place.nvcc.path}: exit status 2: kernel.cu(7): error: no such luck",
    )
    assert second == defined(good)[0]
    assert rank.restore() == Answer(defined(good), known=True)
    place.nvcc.on_each_kernel(":")
    assert warm(rank, bad).targets == defined(bad)
    assert place.nvcc.compiled == {**once_each(bad, good), sources_of(bad)[directory].splitlines()[0]: 2}


def test_a_compiler_that_fails_on_all_kernels_names_one_and_counts_the_others(node: Node, place: Place) -> None:
    place.nvcc.on_each_kernel("exit 1")
    (answer,) = warm(place.rank(node), target()).targets
    assert answer.error.endswith("exit status 1: it said nothing (and 4 more kernels)")
    assert not place.cache.own.joinpath("markers").exists()


def test_a_stub_that_cannot_be_made_is_tried_again(node: Node, place: Place) -> None:
    rank = place.rank(node)
    working = place.nvcc.path.read_text(encoding="utf-8")
    place.nvcc.path.write_text("#!/bin/sh\necho no disk >&2; exit 1\n", encoding="utf-8")
    assert [each.error for each in warm(rank, target()).targets] == [f"{place.nvcc.path}: exit status 1: no disk"]
    place.nvcc.path.write_text(working, encoding="utf-8")
    assert warm(rank, target()).targets == defined(target())


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"DG_JIT_NVCC_COMPILER": "/nowhere/nvcc"}, "DG_JIT_NVCC_COMPILER=/nowhere/nvcc is not there"),
        ({"DG_JIT_NVCC_COMPILER": "", "CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc"),
        ({"DG_JIT_NVCC_COMPILER": "/bin/false"}, "/bin/false: Command '['/bin/false', '--version']' returned non-zero"),
    ],
)
def test_without_a_compiler_the_welcome_says_why(
    node: Node, place: Place, environment: dict[str, str], problem: str
) -> None:
    welcome = node.client().hello(place.hello(**environment))
    assert welcome.problem.startswith(problem)
    assert "\n" not in welcome.problem


# Compiles to an ELF header, but ends its own process the first time, as the kernel does where memory is short.
_DYING_NVRTC = """
import ctypes, enum, os, pathlib, signal
nvrtcResult = enum.Enum("nvrtcResult", "NVRTC_SUCCESS")
OK = nvrtcResult.NVRTC_SUCCESS
CUBIN = b"\\x7fELF\\x02\\x01\\x01" + bytes(57)
def nvrtcVersion():
    return OK, 13, 0
def nvrtcCreateProgram(*arguments):
    return OK, 0
def nvrtcCompileProgram(*arguments):
    try:
        pathlib.Path(__file__).with_name("died").touch(exist_ok=False)
    except FileExistsError:
        return (OK,)
    os.kill(os.getpid(), signal.SIGKILL)
def nvrtcGetCUBINSize(program):
    return OK, len(CUBIN)
def nvrtcGetCUBIN(program, place):
    ctypes.memmove(place, CUBIN, len(CUBIN))
    return (OK,)
def nvrtcDestroyProgram(program):
    return (OK,)
"""


def test_a_worker_of_nvrtc_that_dies_spoils_its_target_alone(place: Place, tmp_path: Path) -> None:
    bindings = tmp_path / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    for path in (bindings, bindings.parent):
        (path / "__init__.py").touch()
    (bindings / "nvrtc.py").write_text(_DYING_NVRTC, encoding="utf-8")
    with Node(tmp_path, modules=tmp_path) as node:
        rank = place.rank(node, place.hello(kind="nvrtc"))
        (warmed,) = warm(rank, target()).targets
        assert "terminated abruptly" in warmed.error
        assert warm(rank, target(n=512), target()).targets == defined(target(n=512), target())


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(node: Node, place: Place) -> None:
    place.cache.root.write_bytes(b"a file in the way")
    answer = warm(place.rank(node), target())
    (warmed,) = answer.targets
    assert f"the kernel cache {place.cache.root} cannot be written" in warmed.error
    assert "make it writable, or set SGLANG_DG_CACHE_DIR" in warmed.error
    assert "\n" not in warmed.error
    assert answer.notes == ()


def test_a_marker_that_cannot_be_written_does_not_spoil_the_answer(node: Node, place: Place) -> None:
    place.cache.own.mkdir(parents=True)
    (place.cache.own / "markers").write_bytes(b"a file in the way")
    answer = warm(place.rank(node), target())
    assert answer.targets == defined(target())
    (note,) = answer.notes
    assert note.startswith("no marker is left for the next start: ")


def test_a_gpu_that_gives_no_context_is_told_from_other_causes(node: Node, place: Place) -> None:
    rank = place.rank(node, place.hello(gpu=msgspec.structs.replace(GPU, name=TAKEN_GPU)))
    (warmed,) = warm(rank, target()).targets
    assert warmed.no_context
    assert warmed.error.startswith("no CUDA context for recording: CUDA error: ")
    (other,) = warm(place.rank(node), target("a GEMM that raises at 1")).targets
    assert other.error and not other.no_context


def test_what_was_recorded_before_a_child_died_is_of_use_to_the_next_start(node: Node, place: Place) -> None:
    dying = target("a GEMM that is killed at 40")
    (warmed,) = warm(place.rank(node), dying).targets
    assert warmed.error == "the recording process ended without a word (exit code -9)"
    early = [use.directory for use in definition(target()) if use.m < 40]
    assert wait_until(lambda: all(place.cache.has(directory) for directory in early))
    assert warm(place.rank(node), target()).targets == defined(target())
    assert place.nvcc.compiled == once_each(target())


def test_nothing_is_said_of_kernels_of_a_target_that_has_failed_already(place: Place, tmp_path: Path) -> None:
    place.nvcc.on_each_kernel("exit 1")
    with Node(tmp_path) as node:
        rank = place.rank(node)
        (warmed,) = warm(rank, target("a GEMM that is killed at 40")).targets
        assert warmed.error == "the recording process ended without a word (exit code -9)"
        assert wait_until(lambda: place.nvcc.compiled.total() == 3)
        rank.close()
        node.end()
        assert "exit status 1" not in node.log


def test_a_surprise_spoils_one_target_and_is_in_the_log(place: Place, tmp_path: Path) -> None:
    odd = target("a GEMM with a dot in its name")
    with Node(tmp_path) as node:
        first, second = warm(place.rank(node), odd, target()).targets
        assert first.error.startswith("ValueError: not a kernel's directory: 'kernel.standin.gemm.")
        assert second == defined(target())[0]
        assert str(odd) in node.log and "Traceback" in node.log


def test_where_the_gpu_has_little_memory_left_children_wait_for_each_other(place: Place, tmp_path: Path) -> None:
    (first, *_) = definition(target())
    with Node(tmp_path) as node:
        rank = place.rank(node)
        rank.announce([target("a GEMM that hangs at 2")], 0)
        assert wait_until(lambda: place.cache.has(first.directory))
        assert rank.warm([target(n=512)], 0, 0.5).targets[0].not_ready
        assert warm(rank, target(k=512)).targets == defined(target(k=512))


def test_a_child_starts_without_the_service_and_all_that_it_imports(node: Node, place: Place) -> None:
    (warmed,) = warm(place.rank(node), target("a GEMM that names its modules")).targets
    assert f"{recording.__name__} " in f"{warmed.error} "
    assert f"{pool.__name__} " not in f"{warmed.error} "


def test_a_library_that_cannot_be_imported_spoils_the_answer_and_not_the_service(place: Place, tmp_path: Path) -> None:
    (tmp_path / "broken_library.py").write_text("raise AssertionError('CUDA home is not found')", encoding="utf-8")
    with Node(tmp_path, library="broken_library", modules=tmp_path) as node:
        rank = place.rank(node)
        for _ in range(2):
            (warmed,) = warm(rank, target()).targets
            assert warmed.error.startswith("no process for recording: ")
        assert rank.restore() == Answer(())


def test_a_deep_gemm_whose_jit_is_not_known_is_left_alone_with_one_line(
    node: Node, place: Place, tmp_path: Path
) -> None:
    package = tmp_path / "newer" / "deep_gemm"
    (package / "include" / "deep_jit").mkdir(parents=True)
    hello = msgspec.structs.replace(place.hello(), deep_gemm=str(package))
    welcome = node.client().hello(hello)
    assert welcome.problem == f"the JIT of the DeepGEMM in {package} is not known to this version"


# Further kernels


def leave_a_kernel(place: Place, name: str, owner: object) -> str:
    """What DeepGEMM leaves in its cache when a rank of the service ``owner`` compiles a kernel itself."""
    directory = f"kernel.{name}.{'0' * 32}"
    source = f"// {name}"
    place.cache.publish(directory, source, cubin_of(source, FLAGS))
    (place.cache.path(directory) / "kernel.cubin.flags").write_text(f"{FLAGS}\n{owner}\n")
    return directory


def test_what_a_rank_has_compiled_itself_is_in_its_marker_and_that_of_another_server_is_not(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Node(tmp_path_factory.mktemp("mortal"), DG_JIT_WITH_LINEINFO="1") as node:
        asked, other = target(), {"model": "DeepSeek-V3", "rank": "1"}
        clients = [place.rank(node), place.rank(node, place.hello(launch=other))]
        for client in clients:
            warm(client, asked)
        # A rank that has no targets yet is not taken for one that has none.
        place.rank(node, place.hello(launch={"model": "another", "rank": "0"}))
        mine = leave_a_kernel(place, "mine", node.socket)
        leave_a_kernel(place, "theirs", "/another/service.sock")
        node.end()
        assert node.left() == []
    markers = [msgspec.json.decode(path.read_bytes(), type=Marker) for path in place.cache.own.glob("markers/*/*.json")]
    assert [[each.directory for each in marker.further] for marker in markers] == [[mine], [mine]]
    assert all({each.target for each in marker.targets} == {asked} for marker in markers)
    assert all(mine in {file.directory for file in marker.files} for marker in markers)


def test_a_further_kernel_that_is_gone_does_not_keep_a_restart_from_its_targets(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Node(tmp_path_factory.mktemp("mortal"), DG_JIT_WITH_LINEINFO="1") as node:
        warm(place.rank(node), target())
        gone = leave_a_kernel(place, "gone", node.socket)
        node.end()
        assert node.left() == []
    shutil.rmtree(place.cache.path(gone))
    with Node(tmp_path_factory.mktemp("mortal"), DG_JIT_WITH_LINEINFO="1") as node:
        answer = place.rank(node).restore()
    assert (answer.known, answer.notes) == (True, ())
    assert [each.target for each in answer.targets] == [target()]
