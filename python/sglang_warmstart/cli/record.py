"""``sglang-warmstart record``: get the plan of a server by a start in which DeepGEMM compiles no kernel.

The server starts as usual, but with dummy weights, and every GEMM returns zeros. Its ranks meet all targets that they
would warm. The node's service writes down which kernels those need. Once the server is ready, it is stopped.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sglang_warmstart.base.switches import BUNDLE, JIT_MONITOR, PLANS, PRECOMPILE, STRICT, WARMSTART
from sglang_warmstart.bundle import toolchain
from sglang_warmstart.cli.compile import held_off, interruptible
from sglang_warmstart.cli.ending import EXIT_FAILED, command, read_plans, write_plan
from sglang_warmstart.deepgemm import further
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.plan import Plan, PlanError
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE

# With every cache of Triton and FlashInfer cold, a start takes minutes.
_START_LIMIT_S = 1800.0
_STOP_LIMIT_S = 30.0
_LAST_LINES = 15
# Below the ports that the kernel gives to connections.
_PORTS = (15000, 32000)

# What decides whether there is anything to record; the rest is the user's.
_SWITCHES = {WARMSTART.name: "1", PRECOMPILE.name: "1", STRICT.name: "0", JIT_MONITOR.name: "warn"}
# The server's own cache: what DeepGEMM compiles into it is what the plan lacks.
_KERNELS = "kernels"


class ServerError(Exception):
    """The server did not start; holds its last words."""


@command
def record(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The file to write (JSON).")],
    log: Annotated[
        Path | None,
        typer.Option(help="The file for the server's log. Default: a temporary file, kept if the start fails."),
    ] = None,
    limit_s: Annotated[float, typer.Option(min=1, help="Seconds that the start may take.")] = _START_LIMIT_S,
) -> None:
    """Record the plan of a server: sglang-warmstart record -o plan.json --model-path M, and the server's own arguments.

    Needs the GPUs and the SGLang of that server, and nvcc; no weights (--load-format dummy is added if no format is
    named), and no kernel of a target is compiled. Exit status 0 when all targets are in the plan, 1 when some are not
    or the server did not start, 2 when it cannot be recorded so.
    """
    arguments = list(context.args)
    if "--help" in arguments or not _has(arguments, "--model-path", "--model"):
        raise typer.BadParameter("name the model: --model-path M, and the arguments of the server")
    if _has(arguments, "--ssl-keyfile", "--ssl-certfile"):
        raise PlanError("`record` asks the server over plain HTTP on this machine: leave out --ssl-...")
    if _value(arguments, "--nnodes") not in (None, "1"):
        raise PlanError(
            "a server of several nodes is not recorded: start it once, and take `plan export` of each node's cache"
        )
    kept = log or _new_log()
    failed = True
    with (
        tempfile.TemporaryDirectory(prefix="warmstart-plans-", ignore_cleanup_errors=True) as directory,
        interruptible(),
    ):
        try:
            _start_and_stop(arguments, Path(directory), kept, Console(stderr=True), limit_s)
            plan = _with_further(_plan_in(Path(directory), kept), Path(directory, _KERNELS))
            failed = bool(silent := _silent_ranks(plan))
        except ServerError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(EXIT_FAILED) from error
        finally:
            if failed:
                typer.echo(f"its log is {kept}", err=True)
            elif log is None:
                kept.unlink()
    if silent:
        typer.echo(f"nothing was recorded by rank {', '.join(silent)}: its log says why", err=True)
    write_plan(output, plan)
    raise typer.Exit(EXIT_FAILED if silent else 0)


def _new_log() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="warmstart-record-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def _silent_ranks(plan: Plan) -> list[str]:
    """The ranks of the server that the plan has nothing of."""
    launches = [launch.launch for launch in plan.launches]
    count = max((int(each.get("tp_size", 1)) * int(each.get("pp_size", 1)) for each in launches), default=1)
    return sorted({str(rank) for rank in range(count)} - {each.get("rank", "0") for each in launches}, key=int)


def _start_and_stop(arguments: Sequence[str], plans: Path, log: Path, console: Console, limit_s: float) -> None:
    """Start a server, and stop it with all that it has started once it is ready, or cannot be."""
    arguments, port = _completed(arguments)
    command_line = [sys.executable, "-m", "sglang.launch_server", *arguments]
    with log.open("wb") as file, held_off():
        # A session of its own: it is stopped as a whole, and Ctrl-C in the terminal is for this process.
        process = subprocess.Popen(
            command_line,
            env=_environment(os.environ, plans),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        with console.status("starting the server, to record what it needs"):
            _wait_until_ready(process, port, log, console, limit_s)
    finally:
        # Nobody else would end it: whoever is impatient waits for that.
        with held_off():
            _stop(process)


def _completed(arguments: Sequence[str]) -> tuple[list[str], int]:
    """The server's arguments with those that a recording needs, and the port that it answers on."""
    completed = list(arguments)
    if not _has(completed, "--load-format"):
        completed += ["--load-format", "dummy"]
    port = _free_port()
    # The last one counts. Nobody else is to ask a server whose answers are made of zeros.
    return [*completed, "--host", "127.0.0.1", "--port", str(port)], port


def _free_port() -> int:
    """A port that nobody listens on. SGLang takes the one 10000 above it for gRPC, which must exist."""
    while True:
        port = random.randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _environment(environment: Mapping[str, str], plans: Path) -> dict[str, str]:
    # What a bundle would bring need not be recorded, and is to be.
    kept = {name: value for name, value in environment.items() if name != BUNDLE.name}
    return {**kept, **_SWITCHES, PLANS: str(plans), DEEP_GEMM_CACHE: str(plans / _KERNELS)}


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, console: Console, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    # Not through a proxy that the machine may have set for the outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with log.open(encoding="utf-8", errors="replace") as lines:
        while True:
            for line in lines:
                if "] warmstart" in line:
                    console.print(Text(line.rstrip()), soft_wrap=True)
            if process.poll() is not None:
                raise ServerError(f"the server ended with status {process.returncode}\n{_last_words(log)}")
            if _is_ready(opener, port):
                return
            if time.monotonic() > end:
                raise ServerError(f"the server was not ready after {limit_s:g} s\n{_last_words(log)}")
            time.sleep(0.5)


def _is_ready(opener: urllib.request.OpenerDirector, port: int) -> bool:
    try:
        # 503 as long as the server starts, its own first request included.
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _plan_in(directory: Path, log: Path) -> Plan:
    found = sorted(directory.glob("*.json"))
    if not found:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "warmstart" in line]
        raise ServerError(
            "no rank of the server has recorded anything: it does not use DeepGEMM's JIT, or does not load the plugin\n"
            + "\n".join(said[-_LAST_LINES:])
        )
    return read_plans(found)


def _with_further(plan: Plan, root: Path) -> Plan:
    """A plan with what the server's ranks have compiled themselves in a cache that nobody else has used."""
    deep_gemm = toolchain.installed_deep_gemm()
    cache = plan.cache_in(root)
    found = further.compiled_in(cache, further.names_in(cache))
    return plan if deep_gemm is None else plans.with_further(plan, found, deep_gemm / "include")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_LIMIT_S)
    # What it has started outlives it by a moment, or for good.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])


def _has(arguments: Sequence[str], *names: str) -> bool:
    return any(argument.partition("=")[0] in names for argument in arguments)


def _value(arguments: Sequence[str], name: str) -> str | None:
    for number, argument in enumerate(arguments):
        option, separator, value = argument.partition("=")
        if option == name:
            return value if separator else (arguments[number + 1] if number + 1 < len(arguments) else "")
    return None
