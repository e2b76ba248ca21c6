"""Further kernels: those that DeepGEMM compiled for calls that are no target, such as ``fp8_einsum``.

SGLang calls some functions of DeepGEMM past its wrapper, and nobody sweeps them. What they need is known once they have
been called: DeepGEMM then compiles in the rank. The command before its compiler leaves a file beside the kernel, with
the compiler's flags and the server that the rank belongs to, and DeepGEMM moves both into its cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE
from sglang_warmstart.deepgemm.marker import FurtherKernel
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel

# Of a kernel that a rank has compiled: a line of flags, and a line that names the server's service.
FLAGS = f"{CUBIN}.flags"


def names_in(cache: KernelCache) -> set[str]:
    """The names of all entries in the root that is written; none where it cannot be listed."""
    with suppress(OSError):
        return {path.name for path in (cache.root / "cache").glob("*")}
    return set()


def in_marker(cache: KernelCache, kernels: Iterable[FurtherKernel]) -> list[RecordedKernel]:
    """Those that a marker names, as far as they are still in the cache."""
    found = []
    for each in kernels:
        with suppress(OSError, ValueError):
            source = (cache.path(each.directory) / SOURCE).read_bytes().decode()
            found.append(RecordedKernel(each.directory, source, each.flags, m=0))
    return found


def compiled_in(cache: KernelCache, names: Iterable[str], service: Path | None = None) -> list[RecordedKernel]:
    """Those of the entries that ranks have compiled themselves, by name.

    Args:
        service: of the server that the ranks belong to; any if it is None.
    """
    found = []
    for name in sorted(names):
        entry = cache.path(name)
        try:
            cache.dialect.kernel_name(name)
            flags, owner, *_ = (entry / FLAGS).read_text(encoding="utf-8").split("\n")
            source = (entry / SOURCE).read_bytes().decode()
        except (OSError, ValueError):
            continue  # no rank's: there is no such file, or nobody here has written it, or it is no kernel
        if service is None or owner == str(service):
            found.append(RecordedKernel(name, source, flags, m=0))
    return found
