"""FlashInfer: watched where it builds a module with ninja. Its cache cannot be moved (see :mod:`.ninja`)."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine, ninja, ninja_ahead
from sglang_warmstart.libraries.library import Library, covered_by_forward_or_bundle
from sglang_warmstart.libraries.machine import Environment

# Those that are in the commands which FlashInfer writes. To FlashInfer, an empty one of the first kind is as none, ...
_SWITCHES = (
    "FLASHINFER_CXX_LAUNCHER",
    "FLASHINFER_EXTRA_CFLAGS",
    "FLASHINFER_EXTRA_CUDAFLAGS",
    "FLASHINFER_EXTRA_LDFLAGS",
    "FLASHINFER_JIT_DEBUG",
    "FLASHINFER_JIT_LINEINFO",
    "FLASHINFER_JIT_VERBOSE",
    "FLASHINFER_NVCC_LAUNCHER",
    "FLASHINFER_NVCC_THREADS",
)
# ... and one of these is the compiler.
_COMPILERS = ("CC", "FLASHINFER_NVCC")


class FlashInfer(Library):
    """FlashInfer.

    Each version has a directory of its own, with one below it per set of architectures; a module is a directory
    ``cached_ops/NAME`` in that.

    Its lock is a flock of ``cached_ops/tmp/NAME.lock``.
    """

    name = "flashinfer"
    distributions = ("flashinfer-python",)
    left_out = ("*/cached_ops/tmp", "*/flashinfer_jit.log", *ninja.LEFT_OUT)
    module = "flashinfer.jit.core"
    hooks: ClassVar[Mapping[str, str]] = {
        "flashinfer.jit.core.run_ninja": "FlashInfer has no hook; called once per module that is loaded, if the "
        "package has not brought it compiled"
    }
    remedy = covered_by_forward_or_bundle(name)
    ahead = ninja_ahead.__name__
    variables = ("FLASHINFER_*",)

    def root(self, environment: Environment) -> Path | None:
        """Source: ``flashinfer/jit/env.py``. An empty variable is the working directory; without a home it fails."""
        named = environment.get("FLASHINFER_WORKSPACE_BASE")
        base = Path(named) if named is not None else machine.home(environment)
        if base is None:
            return None
        return machine.resolved(base / ".cache" / "flashinfer" / machine.version(*self.distributions))

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``flashinfer/jit/core.py`` (``build_and_load``) and ``cpp_ext.py`` (the commands)."""
        switches = {name: environment[name] for name in _SWITCHES if environment.get(name)}
        switches |= {name: environment[name] for name in _COMPILERS if name in environment}
        return {
            "flashinfer": machine.version(*self.distributions),
            "cache": str(self.root(environment)),
            **machine.headers("flashinfer", "data"),
            # Its ABI is in the commands, and the directory of Python's headers.
            "torch": machine.version("torch"),
            "python headers": sysconfig.get_path("include"),
            "switches": " ".join(f"{name}={value}" for name, value in sorted(switches.items())) or "none",
            **machine.ninja_key(environment),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`.

        Source: ``run_ninja`` in FlashInfer's ``jit/cpp_ext.py``. Not the ``build`` of a module: its class is another
        from 0.6.17 on. What FlashInfer has of CuTe DSL's kernels is watched there (:mod:`.cute_dsl`).
        """

        def run_ninja(original: Callable[..., Any], workdir: Path, ninja_file: Path, *args: Any, **kwargs: Any) -> Any:
            # The directory has the module's name.
            lock = workdir.parent / "tmp" / f"{workdir.name}.lock"
            with ninja.building(self, workdir.name, workdir, ninja_file, lock):
                return original(workdir, ninja_file, *args, **kwargs)

        hooks.wrap(module, "run_ninja", run_ninja, "workdir, ninja_file, verbose")
