"""`sglang-warmstart run`: the node's service is there first, and the process becomes the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from kit.environment import python_path
from kit.node import wait_until
from kit.server import Server
from sglang_warmstart.base.private_directory import ALIVE, PREFIX
from sglang_warmstart.base.switches import EARLY, PLANS, RESTORING, SERVICE
from sglang_warmstart.node.client import ServiceClient

RUN = (sys.executable, "-c", "from sglang_warmstart.cli import main; main()", "run")
PYTHON = (sys.executable, "-c")

# What the main process of a server does, without importing SGLang.
SERVER = """
import os, sys
from sglang_warmstart.sglang.exact_warmup import warmup
from types import SimpleNamespace

warmup.is_wanted = lambda: True
warmup.seam = lambda: SimpleNamespace(decided=lambda arguments: arguments)
service = "SGLANG_WARMSTART_SERVICE"
before = os.environ.get(service)
warmup.start_node_service({"device": sys.argv[1]})
print(os.getpid(), before, os.environ.get(service), "SGLANG_WARMSTART_EARLY" in os.environ, flush=True)
sys.stdin.read()
"""


def deep_gemm_in(site: Path) -> Path:
    """A directory of a Python path with a package of this name. It is looked for, and not imported."""
    (site / "deep_gemm").mkdir(parents=True)
    (site / "deep_gemm" / "__init__.py").touch()
    return site


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a command: a DeepGEMM that can be found, and a place for temporary files where nothing else is."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    deep_gemm = deep_gemm_in(tmp_path / "site-packages")
    own = {"PYTHONPATH": python_path(deep_gemm), "TMPDIR": str(temporary)}
    # Short, else directories are made in another place: a socket's path has 107 characters at the most.
    if len(str(temporary)) > 45:
        own["TMPDIR"] = os.environ.get("TMPDIR", "/tmp")
    return {name: value for name, value in os.environ.items() if name not in (SERVICE, EARLY)} | own


def run(environment: dict[str, str], *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *command],
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


class Started:
    """A server by `run`, after it has asked for its service.

    Args:
        said: its pid, the service that it was told of, the one that its ranks find, and whether they are told whose.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.said = process.stdout.readline().split()

    @property
    def services(self) -> list[psutil.Process]:
        """The services that it has."""
        alive = [each for each in psutil.Process(self.process.pid).children() if each.status() != psutil.STATUS_ZOMBIE]
        # For a moment a process that begins has no command line.
        assert wait_until(lambda: all(each.cmdline() for each in alive))
        return [each for each in alive if "node.service" in " ".join(each.cmdline())]


@contextmanager
def server(environment: dict[str, str], device: str = "cuda", **more: str) -> Iterator[Started]:
    process = subprocess.Popen(
        [*RUN, "--", *PYTHON, SERVER, device],
        env={**environment, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Started(process)
    finally:
        process.kill()
        process.communicate()


def test_the_command_is_this_process_and_is_told_of_the_service(environment: dict[str, str]) -> None:
    with server(environment) as started:
        pid, told, found, _ = started.said
        assert int(pid) == started.process.pid
        assert told == found, "the one that is there is taken"
        (service,) = started.services
        assert found in service.cmdline() and "--early" in service.cmdline()
        ServiceClient(Path(found)).close()
        assert started.said[3] == "False", "ranks are told where it is, and not that it is theirs"


def test_the_service_ends_with_a_server_that_is_killed(environment: dict[str, str]) -> None:
    with server(environment) as started:
        (service,) = started.services
        socket = Path(started.said[2])
        ServiceClient(socket).close()  # it listens
        started.process.kill()
        started.process.wait()
        assert wait_until(lambda: not service.is_running() or service.status() == psutil.STATUS_ZOMBIE, 10)
        assert wait_until(lambda: not socket.parent.exists(), 10)


def test_the_service_has_ended_when_a_server_ends_by_itself(environment: dict[str, str]) -> None:
    with server(environment) as started:
        (service,) = started.services
        assert started.process.stdin is not None
        started.process.stdin.close()
        assert started.process.wait(30) == 0
        assert not service.is_running() or service.status() == psutil.STATUS_ZOMBIE
        assert not Path(started.said[2]).parent.exists()
        started.process.stdin = None


@pytest.mark.parametrize("variable", [RESTORING, PLANS])
def test_a_service_that_has_to_know_more_is_started_anew_and_the_first_one_ended(
    variable: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with server(environment, **{variable: str(tmp_path / "place")}) as started:
        _, told, found, _ = started.said
        assert told != found
        (service,) = started.services
        assert str(tmp_path / "place") in service.cmdline()
        assert not Path(told).parent.exists()


def test_where_no_service_is_wanted_it_is_ended(environment: dict[str, str]) -> None:
    with server(environment, device="cpu") as started:
        assert started.said[2] == "None"
        assert started.services == []


def test_a_service_of_another_process_is_not_taken(environment: dict[str, str]) -> None:
    # As one that runs within another one's: the variables of the first are inherited.
    with server(environment) as first:
        code = f"import os; os.environ.update({SERVICE}={first.said[2]!r}, {EARLY}='{first.services[0].pid} x')\n"
        second = subprocess.Popen(
            [*PYTHON, code + SERVER, "cuda"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert Started(second).said[2] != first.said[2]
        finally:
            second.communicate("")
        assert len(first.services) == 1, "it lives on"


def test_a_service_that_has_died_is_not_taken(environment: dict[str, str]) -> None:
    kill = """
import os, signal, time
pid = int(os.environ["SGLANG_WARMSTART_EARLY"].split()[0])
os.kill(pid, signal.SIGKILL)
while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
"""
    _check_another_service(kill + SERVER, environment)


def test_a_service_with_another_deep_gemm_is_ended(environment: dict[str, str], tmp_path: Path) -> None:
    other = deep_gemm_in(tmp_path / "other")
    _check_another_service(f"import sys; sys.path.insert(0, {str(other)!r})\n" + SERVER, environment)


def test_two_servers_at_once_have_a_service_each(environment: dict[str, str]) -> None:
    with server(environment) as one, server(environment) as other:
        assert one.said[2] != other.said[2]
        assert len(one.services) == len(other.services) == 1
        one.process.kill()
        one.process.wait()
        ServiceClient(Path(other.said[2])).close()


@pytest.mark.parametrize("dashes", [("--",), ()])
def test_arguments_input_and_status_are_the_commands_own(dashes: tuple[str, ...], environment: dict[str, str]) -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    done = subprocess.run(
        [*RUN, *dashes, *PYTHON, code, "--help", "--", "a b"],
        env=environment,
        input="said",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "['--help', '--', 'a b'] said\n", "")


def test_a_signal_ends_the_command(environment: dict[str, str]) -> None:
    assert run(environment, "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    # Python ignores this one, and would hand that on.
    assert run(environment, "sh", "-c", "kill -PIPE $$").returncode == -signal.SIGPIPE


@pytest.mark.parametrize("words", [(), ("--",)])
def test_without_a_command_it_says_so(words: tuple[str, ...], environment: dict[str, str]) -> None:
    done = run(environment, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sglang-warmstart run: name the command: sglang-warmstart run -- python -m sglang.launch_server ...\n"
    )


def test_a_command_that_is_not_there_or_cannot_be_run_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "--", "/nowhere/python")
    assert (done.returncode, done.stderr) == (127, "sglang-warmstart run: /nowhere/python: command not found\n")
    script = tmp_path / "script"
    script.write_text("#!/nowhere/interpreter\n")
    script.chmod(0o755)
    done = run(environment, "--", str(script))
    assert done.returncode == 127
    assert done.stderr == f"sglang-warmstart run: {script} cannot be run: No such file or directory\n"
    left = [path for path in Path(environment["TMPDIR"]).glob(f"{PREFIX}*") if not (path / ALIVE).exists()]
    assert left == []


def test_switched_off_it_only_becomes_the_command(environment: dict[str, str]) -> None:
    code = f"import os; print(os.environ.get({SERVICE!r}), os.environ.get({EARLY!r}))"
    done = run(environment, "--", *PYTHON, code, SGLANG_WARMSTART="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "None None\n", "")


def test_without_a_service_the_command_starts_all_the_same(environment: dict[str, str]) -> None:
    code = f"""
import os, runpy, sys
from sglang_warmstart.node import launch
def start_early(*_, **__):
    raise OSError(28, "No space left on device")
launch.start_early = start_early
sys.argv[1:] = ["run", "--", sys.executable, "-c", "import os; print(os.environ.get({SERVICE!r}))"]
from sglang_warmstart.cli import main
main()
"""
    stale = {SERVICE: "/nowhere/service.sock"}
    done = subprocess.run(
        [*PYTHON, code], env={**environment, **stale}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "None\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sglang-warmstart run: no service before the server: ")
    assert "No space left on device" in line


def test_the_help_is_that_of_a_command(environment: dict[str, str]) -> None:
    done = run(environment, "--help")
    assert done.returncode == 0
    assert "sglang-warmstart run -- python -m sglang.launch_server" in " ".join(done.stdout.split())


def test_before_the_command_next_to_nothing_is_imported(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *RUN[1:], "--", "true"], env=environment, capture_output=True, text=True
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "sglang_warmstart.cli.run" in modules
    heavy = ("typer", "rich", "msgspec", "asyncio", "multiprocessing", "importlib.metadata", "torch", "sglang", "wrapt")
    assert [name for name in sorted(modules) if name.partition(".")[0] in heavy] == []


@pytest.mark.by_plugin
def test_a_server_starts_and_answers(tiny_model: Path) -> None:
    start = time.monotonic()
    with Server(tiny_model, launch="run") as served:
        assert len(served.generate([5, 6, 7], max_new_tokens=3)) == 3
        assert served.process.pid == os.getsid(served.process.pid)
        commands = [" ".join(process.cmdline()) for process in served.processes()]
        assert not any("node.service" in command for command in commands), "there is nothing for it to do on a CPU"
    assert "sglang-warmstart run" not in served.log
    assert time.monotonic() - start < 180


def _check_another_service(code: str, environment: dict[str, str]) -> None:
    """The server has a service of its own, and that alone."""
    process = subprocess.Popen(
        [*RUN, "--", *PYTHON, code, "cuda"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        started = Started(process)
        assert started.said[1] != started.said[2]
        assert len(started.services) == 1
    finally:
        process.kill()
        process.communicate()
