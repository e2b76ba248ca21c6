"""Find out which kernels DeepGEMM would compile for a target: sweep every M with a compiler that only records.

DeepGEMM is told to run our command in place of nvcc. The command keeps source and flags, and returns a stub. The stubs
stay in the memory of the process and in its private cache. So this runs in a process of its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang_warmstart.deepgemm.dialects import FIRST_JIT, Dialect
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE

_SCRIPT = """#!/bin/sh
# Called as DeepGEMM calls nvcc: SOURCE {output} CUBIN FLAGS...
if [ "$1" = --version ]; then exec cat {version}; fi
if [ "$2 $3" != "{output}" ] || [ "$#" -lt 5 ]; then
  echo "the recording compiler expected SOURCE {output} CUBIN FLAGS, got: $*" >&2
  exit 64
fi
cubin=$4
shift 4
# Beside the cubin: DeepGEMM itself moves both to the directory that bears the kernel's digest.
printf '%s\\n' "$*" > "$cubin.flags" && cp {stub} "$cubin" && printf . >> {count}
"""


class RecordedKernel(msgspec.Struct, frozen=True):
    """A kernel as DeepGEMM asked for it.

    Args:
        directory: its name in the cache, by DeepGEMM itself.
        source: CUDA source.
        flags: the compiler's flags, in one line.
        m: the smallest M of the sweep that needs it.
    """

    directory: str
    source: str
    flags: str
    m: int


class RecordingError(Exception):
    """A sweep did not go as the recorder expects; says how."""


@dataclass(frozen=True)
class RecordingCompiler:
    """The command that stands in for nvcc, with a private cache for its stubs.

    Args:
        directory: an empty directory of the recording process alone.
        dialect: of the DeepGEMM that is to call it.
    """

    directory: Path
    dialect: Dialect = FIRST_JIT

    @property
    def cache(self) -> Path:
        """DeepGEMM's cache root for this process."""
        return self.directory / "cache"

    def install(self, environment: MutableMapping[str, str], *, version: str, stub: Path) -> None:
        """Write the command, and tell DeepGEMM of it and of the private cache.

        Args:
            environment: of this process, before DeepGEMM compiles its first kernel.
            version: what the real compiler prints for ``--version``.
            stub: a stub cubin for this GPU.
        """
        kept_version, command = self.directory / "version", self.directory / "compiler"
        kept_version.write_text(version, encoding="utf-8")
        self._count.touch()
        quoted = {"version": str(kept_version), "stub": str(stub), "count": str(self._count)}
        words = {name: shlex.quote(path) for name, path in quoted.items()}
        command.write_text(_SCRIPT.format(**words, output=" ".join(self.dialect.output)), encoding="utf-8")
        command.chmod(0o700)
        # A stub has nothing to show, and cuobjdump need not be there.
        for suffix in ("JIT_NVCC_COMPILER", "JIT_CACHE_DIR", "JIT_DUMP_ASM", "JIT_DUMP_PTX", "JIT_DUMP_SASS"):
            for name in self.dialect.variables(suffix):
                environment.pop(name, None)
        environment["DG_JIT_NVCC_COMPILER"] = str(command)
        environment["DG_JIT_CACHE_DIR"] = str(self.cache)
        environment["DG_JIT_USE_NVRTC"] = "0"
        # DeepJIT wants a toolkit to be there even where the compiler is named; it takes nothing from it.
        if not (environment.get("CUDA_HOME") or environment.get("CUDA_PATH")):
            environment["CUDA_HOME"] = str(self.directory)

    def sweep(self, call: Callable[[int], None], m_values: Iterable[int]) -> Iterator[RecordedKernel]:
        """Call for each M and yield each kernel that DeepGEMM had compiled for it, as soon as it has.

        Raises:
            RecordingError: DeepGEMM did not leave a kernel where it is expected to.
        """
        seen: set[str] = set()
        with self._count.open("rb") as count:
            compiled = 0
            for m in m_values:
                call(m)
                # A system call per M, and not a look into the directory: most Ms compile nothing.
                now = os.fstat(count.fileno()).st_size
                if now != compiled:
                    fresh = self._directories() - seen
                    if len(fresh) != now - compiled:
                        raise RecordingError(
                            f"M={m}: the compiler ran {now - compiled} times, {len(fresh)} kernels came into the cache"
                        )
                    seen |= fresh
                    compiled = now
                    yield from (self._kernel(directory, m) for directory in sorted(fresh))

    @property
    def _count(self) -> Path:
        return self.directory / "count"

    def _directories(self) -> set[str]:
        # There is none where DeepGEMM has another layout: then no kernel has come into it.
        return {path.name for path in (self.cache / "cache").glob("*")}

    def _kernel(self, directory: str, m: int) -> RecordedKernel:
        path = self.cache / "cache" / directory
        try:
            # As bytes: reading text would change line ends, and with them the digest.
            source = (path / SOURCE).read_bytes().decode()
            flags = (path / f"{CUBIN}.flags").read_bytes().decode().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordingError(f"M={m}: {directory}: {error}") from error
        return RecordedKernel(directory, source, flags, m)
