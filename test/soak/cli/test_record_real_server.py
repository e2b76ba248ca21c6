"""`sglang-warmstart record` with a real server, for what it says where there is no GPU.

Everything else about it, with a stand-in for the server: test/cli/test_record.py.
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from kit.environment import child_environment
from kit.model import write_tiny_llama
from kit.ports import free_ports
from kit.server import as_options, cpu_server_args

COMMAND = str(Path(sysconfig.get_path("scripts"), "sglang-warmstart"))


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
    log = Path(done.stderr.rstrip().splitlines()[-1].removeprefix("its log is "))
    assert "exact-warmup" in log.read_text()
    log.unlink()
    assert not (tmp_path / "plan.json").exists()
