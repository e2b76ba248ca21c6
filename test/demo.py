"""`make demo`: a real SGLang server with two pipeline stages, the plugin in each of its processes, and no GPU."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kit.environment import child_environment
from kit.model import write_tiny_llama
from kit.release import installed_release
from kit.server import Server
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FLAG = "--disable-attn-tp-gather"
SWITCHES = {"SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1", "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
PROMPT = [5, 6, 7, 8]
# SGLang's logging puts the stage behind the time, and nothing there in the main process.
LOG_LINE = re.compile(r"^\[[^\]]*?(?: (?P<stage>PP\d+))?\] (?P<text>.*)$")
PROCESSES = ("main", "PP0", "PP1")


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
    show_server(console, directory, log_file)
    console.print()
    with step(console, f"look for {FLAG} in launch_server --help"):
        entry = flag_help()
    console.print(entry, markup=False, soft_wrap=True)
    console.print("\n[bold]sglang-warmstart doctor[/]")
    show_doctor()


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
            console.print(f"[red]demo failed:[/] {escape(reason)}; the server's log is {log_file}", soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; the server is stopped")
            status = 128 + signal.SIGINT
        else:
            status = 0
        log_file.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())
