"""What a serving process imports because of the plugin. `python test/test_imports.py` measures how long that takes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from kit.environment import child_environment
from kit.fork_server import ForkServer

RESULT = Path(__file__).with_name("import_cost.json")
ROUNDS = 11

# As a rank, which has imported what is hooked: everything that can be installed is.
LOAD = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
from sglang_warmstart import plugin
imported = time.perf_counter()
plugin.register()
installed = time.perf_counter()
new = sorted(set(sys.modules) - before)
print("LOADED", json.dumps([1000 * (imported - start), 1000 * (installed - start), new]))
"""


def load(said: str) -> tuple[float, float, list[str]]:
    """Milliseconds of the import, and with installing all hooks; the modules that are new."""
    line = next(line for line in said.splitlines() if line.startswith("LOADED "))
    imported, installed, modules = json.loads(line.removeprefix("LOADED "))
    return imported, installed, modules


@pytest.mark.by_plugin
def test_a_rank_imports_no_archive_no_command_line_and_no_library_but_wrapt(forks: ForkServer) -> None:
    _, _, modules = load(forks.run(LOAD).checked())
    assert {name.partition(".")[0] for name in modules} - sys.stdlib_module_names <= {"sglang_warmstart", "wrapt"}
    rooms = {name.split(".")[1] for name in modules if name.count(".")} if modules else set()
    assert not rooms & {"bundle", "report", "cli"}
    assert not {"tarfile", "asyncio.subprocess", "http.client", "zstandard", "rich", "typer", "fsspec"} & set(modules)


def measure() -> dict[str, object]:
    """Start a process that has imported SGLang, several times, and load the plugin in it."""
    first = "import sglang.srt.model_executor.model_runner, sglang.srt.entrypoints.engine, sglang.srt.plugins\n"
    rounds = []
    for _ in range(ROUNDS):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", first + LOAD],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        rounds.append(load(done.stdout))
    return {
        "what": "milliseconds to import the plugin, and to import it and install all features, beyond SGLang's imports",
        "import_ms": [round(each[0], 2) for each in rounds],
        "import_and_install_ms": [round(each[1], 2) for each in rounds],
        "median_import_ms": round(statistics.median(each[0] for each in rounds), 2),
        "median_import_and_install_ms": round(statistics.median(each[1] for each in rounds), 2),
        "modules": len(rounds[0][2]),
    }


if __name__ == "__main__":
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({name: value for name, value in result.items() if name.startswith("median")})
