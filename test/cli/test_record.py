"""`sglang-warmstart record`: a server is started, what its ranks need is written down, and it is stopped again.

Without a GPU no rank has anything to say. So a stand-in for the server's ranks says it, in a process that starts,
answers and is stopped as a server is; and the real server is there for what it says where there is no GPU.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from kit.environment import python_path
from kit.node import wait_until
from kit.plans import identity_in
from kit.recorded import recording
from sglang_warmstart.cli import app
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.plan import Plan, Planner
from typer.testing import CliRunner

# As the console script does it, and some more where a test needs it.
_COMMAND = """
import sys
from sglang_warmstart.cli import main
import sglang_warmstart.cli.record as module
{before}
main()
"""

_SERVER = """
import http.server, json, os, pathlib, signal, subprocess, sys, time
here = pathlib.Path(__file__).parents[1]
script = json.loads((here / "script.json").read_text())
names = [name for name in os.environ if name.startswith("SGLANG")]
seen = {"arguments": sys.argv[1:], "environment": {name: os.environ[name] for name in names}}
(here / "seen.json").write_text(json.dumps(seen))
print("[now] warmstart: hello", flush=True)
if "dies" in script:
    sys.exit("I cannot go on")
if "is stubborn" in script:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
(here / "child").write_text(str(child.pid))
if "hangs" in script:
    time.sleep(1000)
asked = [0]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked[0] += 1
        if asked[0] == 2:
            for path in here.glob("plan-*.json"):
                pathlib.Path(os.environ["SGLANG_WARMSTART_PLANS"], path.name).write_bytes(path.read_bytes())
        self.send_response(200 if asked[0] >= 2 and self.path == "/health" else 503)
        self.end_headers()

port = int(sys.argv[-1 - sys.argv[::-1].index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass
class Recording:
    """A command that records a stand-in.

    Args:
        directory: of its own.
    """

    directory: Path

    def __post_init__(self) -> None:
        package = self.directory / "sglang"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(_SERVER)
        self.script()

    def script(self, *mishaps: str) -> None:
        (self.directory / "script.json").write_text(json.dumps(mishaps))

    def plan_of_a_rank(self, number: int, plan: Plan) -> None:
        (self.directory / f"plan-{number}.json").write_bytes(plans.encode(plan))

    def start(self, *arguments: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
        # Behind nohup it is ignored, and would be there.
        hangup = signal.signal(signal.SIGHUP, lambda *_: None)
        try:
            return subprocess.Popen(
                [sys.executable, "-c", _COMMAND.format(before=before), "record", "-o", str(self.output), *arguments],
                env={**os.environ, "PYTHONPATH": python_path(self.directory), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGHUP, hangup)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def output(self) -> Path:
        return self.directory / "plan.json"

    @property
    def seen(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.directory / "seen.json").read_text())
        return found

    @property
    def arguments(self) -> list[str]:
        """Those that the server was given."""
        found = self.seen["arguments"]
        assert isinstance(found, list)
        return found

    @property
    def is_gone(self) -> bool:
        """Whether nothing of the server lives."""
        return not psutil.pid_exists(int((self.directory / "child").read_text()))


@pytest.fixture
def recorded(tmp_path: Path) -> Recording:
    return Recording(tmp_path)


def plan_of(rank: str) -> Plan:
    """What a rank needs: each another target."""
    shape = {"0": ("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048), "1": ("TF32_HC_PRENORM_GEMM", 24, 28672)}[rank]
    deep_gemm = Path("/opt/venv/deep_gemm")
    identity = identity_in(deep_gemm)
    planner = Planner(identity, "sgl-deep-gemm 0.1.0", "4567")
    planner.add(identity, {"rank": rank}, [recording().of_target(*shape, deep_gemm / "include")])
    return planner.plan()


def test_the_plans_of_all_ranks_become_one_and_the_server_is_stopped(recorded: Recording) -> None:
    for rank in "01":
        recorded.plan_of_a_rank(int(rank), plan_of(rank))
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        # Another server on the user's port is not taken for it.
        given = ["--model-path", "/a/model", "--tp", "2", "--port", str(other.server_port)]
        status, out, err = recorded.run(
            *given, SGLANG_WARMSTART="0", SGLANG_WARMSTART_BUNDLE="x", SGLANG_WARMSTART_STRICT="1", SGLANG_X="y"
        )
    assert (status, out) == (0, f"{recorded.output}: 3 kernels, 2 targets of 2 ranks\n"), err
    assert "warmstart: hello" in err
    assert plans.decode(recorded.output.read_bytes()) == plans.merged({"0": plan_of("0"), "1": plan_of("1")})
    assert wait_until(lambda: recorded.is_gone)
    assert recorded.arguments[:-1] == [*given, "--load-format", "dummy", "--host", "127.0.0.1", "--port"]
    # SGLang 0.5.12 refuses to start where there is no port 10000 above it.
    assert int(recorded.arguments[-1]) <= 65535 - 10000
    # Its switches are those that a recording needs, and else the user's.
    environment = recorded.seen["environment"]
    assert isinstance(environment, dict)
    assert not Path(environment.pop("SGLANG_WARMSTART_PLANS")).exists()
    expected = {"SGLANG_WARMSTART": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "1", "SGLANG_WARMSTART_STRICT": "0"}
    assert {name: environment[name] for name in expected} == expected
    assert environment["SGLANG_X"] == "y"
    assert "SGLANG_WARMSTART_BUNDLE" not in environment


# What DeepGEMM leaves in its cache when a rank compiles a kernel itself.
_COMPILES_ITSELF = """
entry = pathlib.Path(os.environ["SGLANG_DG_CACHE_DIR"], "cache", "kernel.einsum." + "0" * 32)
entry.mkdir(parents=True)
for name, text in {files}.items():
    (entry / name).write_text(text)
"""


def test_what_the_ranks_compile_themselves_is_in_the_plan_of_each(recorded: Recording, tmp_path: Path) -> None:
    for rank in "01":
        recorded.plan_of_a_rank(int(rank), plan_of(rank))
    package = recorded.directory / "deep_gemm"
    package.mkdir()
    (package / "__init__.py").touch()
    flags = f"-O3 -I{package}/include"
    left = {"kernel.cu": "// einsum", "kernel.cubin": "a cubin", "kernel.cubin.flags": f"{flags}\n/a/socket\n"}
    server = recorded.directory / "sglang" / "launch_server.py"
    server.write_text(_SERVER.replace("asked = [0]", f"asked = [0]\n{_COMPILES_ITSELF.format(files=left)}"))
    mine = tmp_path / "mine"
    status, _, err = recorded.run("--model-path", "m", "--tp", "2", SGLANG_DG_CACHE_DIR=str(mine))
    assert status == 0, err
    plan = plans.decode(recorded.output.read_bytes())
    (name,) = {name for launch in plan.launches for name in launch.further}
    assert [launch.further for launch in plan.launches] == [(name,), (name,)]
    assert (plan.kernels[name].source, plan.flags_of(name, Path("/there"))) == ("// einsum", "-O3 -I/there")
    assert not mine.exists(), "nothing is compiled into the user's own cache"


def test_what_is_not_in_the_plan_is_named_and_the_status_says_so(recorded: Recording) -> None:
    planner = Planner(identity_in(Path("/opt/deep_gemm")), "", "")
    planner.add(identity_in(Path("/opt/deep_gemm")), {"rank": "1", "tp_size": "2", "pp_size": "2"}, [])
    planner.leave_out("<A TARGET [0]>", "a reason")
    recorded.plan_of_a_rank(0, planner.plan())
    given = ["--model-path=/a/model", "--load-format=auto", "--host", "0.0.0.0"]
    status, _, err = recorded.run(*given)
    assert status == 1
    assert "nothing was recorded by rank 0, 2, 3: its log says why" in err
    assert "not in the plan: <A TARGET [0]>: a reason" in err
    assert recorded.output.exists()
    log = next(line for line in err.splitlines() if line.startswith("its log is "))
    Path(log.removeprefix("its log is ")).unlink()
    # What the user says is not said again, but for the address: nobody else is to ask it, and the last one counts.
    assert recorded.arguments[:-1] == [*given, "--host", "127.0.0.1", "--port"]


def log_of(err: str) -> Path:
    return Path(err.rstrip().splitlines()[-1].removeprefix("its log is "))


def test_a_server_that_ends_says_its_last_words(recorded: Recording) -> None:
    recorded.script("dies")
    status, _, err = recorded.run("--model-path", "m")
    assert status == 1
    assert "the server ended with status 1" in err
    assert "I cannot go on" in err
    assert "I cannot go on" in log_of(err).read_text()
    log_of(err).unlink()
    assert not recorded.output.exists()


def test_a_server_that_is_never_ready_is_stopped(recorded: Recording, tmp_path: Path) -> None:
    recorded.script("hangs")
    status, _, err = recorded.run("--model-path", "m", "--limit-s", "1", "--log", str(tmp_path / "log"))
    assert status == 1
    assert "the server was not ready after 1 s" in err
    assert wait_until(lambda: recorded.is_gone)
    assert "warmstart: hello" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_server_too(number: signal.Signals, recorded: Recording) -> None:
    recorded.script("hangs")
    with recorded.start("--model-path", "m") as process:
        assert wait_until(lambda: (recorded.directory / "child").exists())
        process.send_signal(number)
        assert process.wait(30) == 130
    assert wait_until(lambda: recorded.is_gone)
    assert not recorded.output.exists()


def test_impatience_does_not_leave_the_server_behind(recorded: Recording) -> None:
    recorded.script("hangs", "is stubborn")
    with recorded.start("--model-path", "m", before="module._STOP_LIMIT_S = 1.5") as process:
        assert wait_until(lambda: (recorded.directory / "child").exists())
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(60) != 0
    assert wait_until(lambda: recorded.is_gone)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tp", "2"], "name the model"),
        (["--model-path", "m", "--nnodes", "2"], "a server of several nodes is not recorded"),
        (["--model-path", "m", "--ssl-keyfile", "k"], "leave out --ssl-"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_started(
    arguments: list[str], reason: str, recorded: Recording
) -> None:
    result = CliRunner().invoke(app, ["record", "-o", str(recorded.output), *arguments])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not (recorded.directory / "seen.json").exists()
