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
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from kit.environment import child_environment, python_path
from kit.model import write_tiny_llama
from kit.node import wait_until
from kit.plans import identity_in
from kit.ports import free_ports
from kit.recorded import recording
from kit.server import as_options, cpu_server_args
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.plan import Plan, Planner

COMMAND = str(Path(sysconfig.get_path("scripts"), "sglang-warmstart"))

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
        if asked[0] == 3:
            for path in here.glob("plan-*.json"):
                pathlib.Path(os.environ["SGLANG_WARMSTART_PLANS"], path.name).write_bytes(path.read_bytes())
        self.send_response(200 if asked[0] >= 3 and self.path == "/health" else 503)
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

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        # Behind nohup it is ignored, and would be there.
        before = signal.signal(signal.SIGHUP, lambda *_: None)
        try:
            return subprocess.Popen(
                [COMMAND, "record", "-o", str(self.output), *arguments],
                env={**os.environ, "PYTHONPATH": python_path(self.directory), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGHUP, before)

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
    status, out, err = recorded.run("--model-path", "/a/model", "--tp", "2", "--trust-remote-code")
    assert (status, out) == (0, f"{recorded.output}: 3 kernels, 2 targets of 2 ranks\n")
    assert "warmstart: hello" in err
    assert plans.decode(recorded.output.read_bytes()) == plans.merged({"0": plan_of("0"), "1": plan_of("1")})
    assert wait_until(lambda: recorded.is_gone)
    arguments = recorded.seen["arguments"]
    assert isinstance(arguments, list)
    assert arguments[:4] == ["--model-path", "/a/model", "--tp", "2"]
    assert arguments[4:9] == ["--trust-remote-code", "--load-format", "dummy", "--host", "127.0.0.1"]


def test_what_the_user_says_is_not_said_again(recorded: Recording) -> None:
    recorded.plan_of_a_rank(0, plan_of("0"))
    given = ["--model-path=/a/model", "--load-format=auto", "--host", "0.0.0.0"]
    assert recorded.run(*given)[0] == 0
    arguments = recorded.seen["arguments"]
    assert isinstance(arguments, list)
    # But for the address: nobody else is to ask it, and the last one counts.
    assert arguments[:-1] == [*given, "--host", "127.0.0.1", "--port"]


def test_another_server_on_the_users_port_is_not_taken_for_it(recorded: Recording) -> None:
    recorded.plan_of_a_rank(0, plan_of("0"))
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        assert recorded.run("--model-path", "m", "--port", str(other.server_port))[0] == 0


def test_a_rank_that_has_recorded_nothing_is_named_and_the_status_says_so(recorded: Recording) -> None:
    planner = Planner(identity_in(Path("/opt/deep_gemm")), "", "")
    planner.add(identity_in(Path("/opt/deep_gemm")), {"rank": "1", "tp_size": "2", "pp_size": "2"}, [])
    recorded.plan_of_a_rank(0, planner.plan())
    status, _, err = recorded.run("--model-path", "m")
    assert status == 1
    assert "nothing was recorded by rank 0, 2, 3: its log says why" in err
    assert recorded.output.exists()
    log = next(line for line in err.splitlines() if line.startswith("its log is "))
    Path(log.removeprefix("its log is ")).unlink()


def test_the_switches_are_those_that_a_recording_needs(recorded: Recording) -> None:
    recorded.plan_of_a_rank(0, plan_of("0"))
    recorded.run(
        "--model-path",
        "m",
        SGLANG_WARMSTART="0",
        SGLANG_WARMSTART_BUNDLE="x",
        SGLANG_WARMSTART_STRICT="1",
        SGLANG_X="y",
    )
    environment = recorded.seen["environment"]
    assert isinstance(environment, dict)
    assert not Path(environment.pop("SGLANG_WARMSTART_PLANS")).exists()
    expected = {"SGLANG_WARMSTART": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "1", "SGLANG_WARMSTART_STRICT": "0"}
    assert {name: environment[name] for name in expected} == expected
    assert environment["SGLANG_X"] == "y"
    assert "SGLANG_WARMSTART_BUNDLE" not in environment


def test_targets_that_are_left_out_are_named_and_the_status_says_so(recorded: Recording) -> None:
    planner = Planner(identity_in(Path("/opt/deep_gemm")), "", "")
    planner.leave_out("<A TARGET>", "a reason")
    recorded.plan_of_a_rank(0, planner.plan())
    status, _, err = recorded.run("--model-path", "m")
    assert status == 1
    assert "not in the plan: <A TARGET>: a reason" in err
    assert recorded.output.exists()


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
    status, _, err = recorded.run("--model-path", "m", "--limit-s", "3", "--log", str(tmp_path / "log"))
    assert status == 1
    assert "the server was not ready after 3 s" in err
    assert wait_until(lambda: recorded.is_gone)
    assert "warmstart: hello" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_server_too(number: signal.Signals, recorded: Recording) -> None:
    recorded.script("hangs")
    with recorded.start("--model-path", "m") as process:
        assert wait_until(lambda: (recorded.directory / "child").exists())
        process.send_signal(number)
        assert process.wait(30) == 130
    assert wait_until(lambda: recorded.is_gone)
    assert not recorded.output.exists()


def test_impatience_does_not_leave_the_server_behind(recorded: Recording) -> None:
    recorded.script("hangs", "is stubborn")
    with recorded.start("--model-path", "m") as process:
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
    status, _, err = recorded.run(*arguments)
    assert status == 2
    assert reason in err
    assert not (recorded.directory / "seen.json").exists()


def test_where_there_is_no_gpu_a_real_server_has_nothing_to_record_and_that_is_said(tmp_path: Path) -> None:
    arguments = cpu_server_args(write_tiny_llama(tmp_path / "model"), *free_ports(2))
    del arguments["load_format"]
    done = subprocess.run(
        [COMMAND, "record", "-o", str(tmp_path / "plan.json"), *as_options(arguments)],
        env=child_environment({"PYTHONUNBUFFERED": "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "no rank of the server has recorded anything: it does not use DeepGEMM's JIT" in done.stderr
    assert "exact-warmup" in log_of(done.stderr).read_text()
    log_of(done.stderr).unlink()
    assert not (tmp_path / "plan.json").exists()
