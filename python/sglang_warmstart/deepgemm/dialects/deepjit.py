"""DeepJIT, the JIT of DeepGEMM 0.2.x.

Source: ``include/deep_jit`` of its package: ``backend/cuda/backend.hpp`` (command, search for the compiler),
``cache/disk.hpp`` (layout, roots, order of writing), ``runtime/runtime.hpp`` (what is hashed), ``utils/env.hpp``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE, Dialect, executable_in, executable_on_path

COMMITTED, META = ".committed", "meta.json"

_ENTRY = re.compile(r"([A-Za-z0-9_]+)\.([0-9a-f]{32})")
_OLDEST_NVCC = (12, 9)


class DeepJit(Dialect):
    """Entries are ``TAG.DIGEST``.

    The digest covers the compiler's whole text, the flags without the path of the headers, and the source with the text
    of DeepGEMM's headers. So an entry has the same name wherever DeepGEMM is installed, and no digest is computed here:
    the name is always the library's own. An entry counts once ``.committed`` is in it.
    """

    name = "deepjit"
    prefixes = ("DG", "DJ")
    files = (SOURCE, CUBIN, META, COMMITTED)
    output = ("--cubin", "--output-file")
    compilers = ("nvcc",)
    is_relocatable = True

    def is_of(self, deep_gemm: Path) -> bool:
        """See :class:`Dialect`."""
        return (deep_gemm / "include" / "deep_jit" / "backend" / "cuda" / "backend.hpp").is_file()

    def kernel_name(self, directory: str) -> str:
        """See :class:`Dialect`."""
        match = _ENTRY.fullmatch(directory)
        if match is None:
            raise ValueError(f"not a kernel's directory: {directory!r}")
        return match.group(1)

    def directory_of(self, directory: str, compiler: str, flags: str, source: str) -> str:
        """See :class:`Dialect`. It is the same everywhere."""
        self.kernel_name(directory)
        return directory

    def entry(self, source: str, cubin: bytes, flags: str) -> Iterator[tuple[str, bytes]]:
        """See :class:`Dialect`. No library reads meta.json."""
        command = " ".join(("nvcc", SOURCE, *self.output, CUBIN, flags))
        yield SOURCE, source.encode()
        yield CUBIN, cubin
        yield META, json.dumps({"command": command, "compiled_by": "sglang-warmstart"}).encode()
        yield COMMITTED, b""

    def flags_of(self, entry: Path, compiler: str, known: Iterable[str]) -> str | None:
        """See :class:`Dialect`. They are at the end of the command in meta.json."""
        words = str(json.loads((entry / META).read_bytes())["command"]).split()
        return " ".join(words[5:]) if tuple(words[2:4]) == self.output else None

    def compiler_path(self, environment: Mapping[str, str]) -> tuple[str | None, str]:
        """See :class:`Dialect`. A toolkit has to be there even if the compiler is named."""
        home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
        if not home:
            found = executable_on_path(environment)
            home = str(Path(found).parent.parent) if found else "/usr/local/cuda"
        named = self.value(environment, "JIT_NVCC_COMPILER")
        if named:
            path = Path(named).absolute()
            name = next(each for each in self.variables("JIT_NVCC_COMPILER") if each in environment)
            return (str(path) if path.is_file() else None), f"{name}={named} is not there"
        return executable_in(home), f"{home} has no bin/nvcc: set CUDA_HOME"

    def check_compiler(self, version: str) -> str:
        """See :class:`Dialect`."""
        release = re.search(r"release (\d+)\.(\d+)", version)
        if release is None:
            return f"no release in what the compiler prints for --version: {version.strip()[:200]!r}"
        if (int(release.group(1)), int(release.group(2))) < _OLDEST_NVCC:
            return f"this DeepGEMM needs nvcc 12.9 or later, and this is {release.group(1)}.{release.group(2)}"
        return ""

    def takes_for_same(self, version: str, other: str) -> bool:
        """See :class:`Dialect`."""
        return version == other

    def roots(self, value: str) -> tuple[Path, ...]:
        """See :class:`Dialect`. The further ones are only read."""
        return tuple(Path(part) for part in value.split(":"))
