"""`make demo`: kernels compiled for real, all at once; and a real SGLang server with two pipeline stages, the plugin in
each of its processes. No GPU."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kit.environment import child_environment
from kit.model import write_tiny_llama
from kit.recorded import recording
from kit.release import installed_release
from kit.server import Server
from kit.toolchain import toolchain
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from sglang_warmstart.base.events import close_log, open_log
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import CompileJob, Compiler
from sglang_warmstart.deepgemm.digest import name_of
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.node import limits, progress
from sglang_warmstart.node.pool import CompilePool, KernelError, Places
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

FLAG = "--disable-attn-tp-gather"
SWITCHES = {"SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1", "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
PROMPT = [5, 6, 7, 8]
# The experts' second GEMM of DeepSeek-V3: type, N and K.
TARGET = ("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 7168, 2048)
# SGLang's logging puts the stage behind the time, and nothing there in the main process.
LOG_LINE = re.compile(r"^\[[^\]]*?(?: (?P<stage>PP\d+))?\] (?P<text>.*)$")
PROCESSES = ("main", "PP0", "PP1")
PICTURE = Path(__file__).parents[1] / "build" / "demo" / "startup.html"


class DemoFailedError(Exception):
    """One line for the user."""


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Show that something is under way and for how long; one plain line at the end where there is no terminal."""
    start = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=1)
            yield
            progress.advance(task)
    else:
        yield
        console.print(f"{title}: {time.monotonic() - start:.1f} s", markup=False)


class TimedThreads(ThreadPoolExecutor):
    """Threads that note how long they took for the source of each compile."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.seconds: dict[str, float] = {}

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> "Future[Any]":
        def timed() -> Any:
            start = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                for job in arguments:
                    if isinstance(job, CompileJob):
                        self.seconds[job.source] = time.monotonic() - start

        return super().submit(timed)


async def compile_all(pool: CompilePool, kernels: Sequence[RecordedKernel], target: str) -> None:
    await asyncio.gather(*(pool.ensure(kernel, target) for kernel in kernels))


def compile_into(
    cache: KernelCache, compiler: Compiler, kernels: Sequence[RecordedKernel], target: str, workers: int
) -> tuple[int, float, dict[str, float]]:
    """How many had to be compiled, the seconds for all, and those for each source."""
    with TimedThreads(workers) as executor:
        start = time.monotonic()
        bar = progress.Progress(workers)
        pool = CompilePool(executor, cache, compiler, bar, 120, Places(workers))
        try:
            asyncio.run(compile_all(pool, kernels, target))
        except KernelError as error:
            raise DemoFailedError(str(error)) from error
        except BaseException:
            compilers.end_all_runs()  # Ctrl-C is not for them: each has a session of its own
            raise
        finally:
            bar.rest()
        return pool.compiled, time.monotonic() - start, executor.seconds


def show_compiling(console: Console, directory: Path) -> None:
    found = toolchain()
    compiler = found.compiler()
    target, kernels = recording().of_target(*TARGET, found.include)
    cache, workers = KernelCache(directory / "deep_gemm"), limits.compile_workers(None)

    console.print(f"[bold]Exact warm-up[/] of {escape(str(target))}", soft_wrap=True)
    console.print(
        f"Its {len(target.m_values)} Ms need {len(kernels)} kernels, as DeepGEMM itself said on an {recording().gpu}.",
        f"nvcc {compiler.release} compiles them into an empty cache, {workers} at once:",
        soft_wrap=True,
    )
    open_log("compile", {EVENTS: str(directory / "demo")})
    compiled, seconds, each = compile_into(cache, compiler, kernels, str(target), workers)
    again, seconds_again, _ = compile_into(cache, compiler, kernels, str(target), workers)
    close_log()

    right = [Column(title, justify="right") for title in ("from M", "seconds", "KiB")]
    table = Table(right[0], Column("kernel", overflow="fold"), *right[1:], box=box.SIMPLE_HEAD)
    for kernel in kernels:
        name, size = name_of(kernel.directory), cache.describe(kernel.directory).size
        digest = kernel.directory.removeprefix(f"kernel.{name}.")
        table.add_row(str(kernel.m), f"{name}.{digest[:8]}", f"{each[kernel.source]:.1f}", f"{size / 1024:.0f}")
    console.print(table)
    total = sum(each.values())
    console.print(f"[bold]{compiled} kernels compiled in {seconds:.1f} s[/]; their own seconds add up to {total:.1f}")
    console.print(f"[bold]{again} kernels compiled[/] when all are asked for again, in {seconds_again * 1000:.0f} ms\n")


def write_picture(console: Console, directory: Path) -> None:
    """The page of `sglang-warmstart report` about the compiles above."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    write_page([read_run(directory / "demo")], PICTURE)
    console.print(f"\n[bold]The picture of the compiles above[/]: {escape(str(PICTURE))}", soft_wrap=True)


def plugin_lines(log: str) -> dict[str, list[str]]:
    """The plugin's log lines by process."""
    lines: dict[str, list[str]] = {name: [] for name in PROCESSES}
    for line in log.splitlines():
        match = LOG_LINE.match(line)
        # At its start: elsewhere the word may be part of a path.
        if match and match["text"].startswith("warmstart"):
            lines.setdefault(match["stage"] or "main", []).append(match["text"])
    return lines


def flag_help() -> str:
    """What `launch_server --help` says about the flag that the plugin adds."""
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--help"],
        env=child_environment({"COLUMNS": "100"}),
        capture_output=True,
        text=True,
    )
    entry = re.search(rf"^ +{FLAG}\b.*\n(?:(?! +-).+\n)*", shown.stdout, re.MULTILINE)
    if entry is None:
        raise DemoFailedError(f"launch_server --help (status {shown.returncode}) does not name {FLAG}")
    return entry[0].rstrip()


def show_doctor() -> None:
    # About this machine as it is, GPUs included: the kit hides them from what has to run on CPU.
    environment = child_environment({**SWITCHES, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")})
    command = [sys.executable, "-W", "ignore", str(Path(sysconfig.get_path("scripts"), "sglang-warmstart")), "doctor"]
    status = subprocess.run(command, env=environment).returncode
    if status != 0:
        raise DemoFailedError(f"sglang-warmstart doctor ended with status {status}")


def show_server(console: Console, directory: Path, log_file: Path) -> None:
    server = Server(
        write_tiny_llama(directory / "model"),
        "--pp-size",
        "2",
        FLAG,
        environment=SWITCHES,
        log_file=log_file,
    )
    with ExitStack() as stack:
        stack.callback(server.stop)  # wherever Ctrl-C comes
        with step(console, f"start SGLang {installed_release().version} on CPU with two pipeline stages"):
            server.__enter__()
        with step(console, "ask it for tokens"):
            tokens = server.generate(PROMPT, max_new_tokens=8)
        with step(console, "stop it"):
            server.stop()

    console.print(f"\n[bold]Tokens[/] after {escape(str(PROMPT))}: {escape(str(tokens))}")
    console.print("\n[bold]What the plugin logged[/], by process")
    for name, texts in plugin_lines(server.log).items():
        if not texts:
            raise DemoFailedError(f"the plugin logged nothing in process {name}")
        for text in texts:
            console.print(f"  [cyan]{name:4}[/] {escape(text)}", soft_wrap=True)


def run(console: Console, directory: Path, log_file: Path) -> None:
    show_compiling(console, directory)
    show_server(console, directory, log_file)
    console.print()
    with step(console, f"look for {FLAG} in launch_server --help"):
        entry = flag_help()
    console.print(entry, markup=False, soft_wrap=True)
    console.print("\n[bold]sglang-warmstart doctor[/]")
    show_doctor()
    write_picture(console, directory)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the server is stopped first
    console = Console(highlight=False)
    # Line by line and at once, or what doctor writes itself comes before what was printed here.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="warmstart-demo-") as directory:
        handle, name = tempfile.mkstemp(prefix="warmstart-demo-", suffix=".log")
        os.close(handle)
        log_file = Path(name)
        try:
            run(console, Path(directory), log_file)
        except (DemoFailedError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(":")
            where = f"; the server's log is {log_file}" if log_file.stat().st_size else ""
            console.print(f"[red]demo failed:[/] {escape(reason)}{where}", soft_wrap=True)
            if not where:
                log_file.unlink()
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; what was started is stopped")
            status = 128 + signal.SIGINT
        else:
            status = 0
        log_file.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())
