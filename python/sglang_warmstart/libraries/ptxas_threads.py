"""Several threads for ptxas, where one module takes long. The machine code was the same in all that was compared.

nvcc's own ``--split-compile`` also splits what comes before ptxas. Then some kernels become others, which is why it is
not used here (``test/libraries/split_compile.py``).
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.machine import Environment

FLAGS = "NVCC_APPEND_FLAGS"
_FLAGS_BEFORE = "NVCC_PREPEND_FLAGS"
_OPTION = "--split-compile"
_HELP_LIMIT_S = 10


def variables(threads: int, environment: Environment) -> dict[str, str]:
    """Variables with which nvcc gives ptxas so many threads, on top of those of an environment.

    None where ptxas is too old for it, or a user has said how many.
    """
    given = environment.get(FLAGS, "")
    said = f"{given} {environment.get(_FLAGS_BEFORE, '')}"
    ptxas = machine.cuda_home(environment) / "bin" / "ptxas"
    if threads < 2 or _OPTION.lstrip("-") in said or not _can_split(ptxas):
        return {}
    return {FLAGS: f"{given} -Xptxas {_OPTION}={threads}".strip()}


@functools.cache
def _can_split(ptxas: Path) -> bool:
    try:
        done = subprocess.run([ptxas, "--help"], capture_output=True, text=True, timeout=_HELP_LIMIT_S, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
    return _OPTION in done.stdout
