"""tvm-ffi, with which SGLang up to 0.5.17 builds its own JIT kernels (``sglang/jit_kernel``).

It is watched where it runs ninja. Its cache cannot be moved (see :mod:`.ninja`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine, ninja, ninja_ahead
from sglang_warmstart.libraries.library import Library, covered_by_forward_or_bundle
from sglang_warmstart.libraries.machine import Environment


class TvmFfi(Library):
    """tvm-ffi.

    A module is a directory, named after it and a hash over its sources, flags and include paths. Its lock is a flock of
    ``lock`` in that.
    """

    name = "tvm-ffi"
    distributions = ("apache-tvm-ffi",)
    left_out = ("*/lock", *ninja.LEFT_OUT)
    module = "tvm_ffi.cpp.extension"
    hooks: ClassVar[Mapping[str, str]] = {
        "tvm_ffi.cpp.extension.build_ninja": "tvm-ffi has no hook; called once per module; up to 0.5.17, SGLang's own "
        "JIT kernels are built here"
    }
    remedy = covered_by_forward_or_bundle(name)
    ahead = ninja_ahead.__name__
    variables = ("TVM_FFI_*",)

    def root(self, environment: Environment) -> Path | None:
        """Source: ``build_inline`` in ``tvm_ffi/cpp/extension.py``. Without a home, it fails.

        An empty variable is the working directory: nothing tells its entries from what else lies there.
        """
        named = environment.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")
        if named == "":
            return None
        path = machine.expanded(named, environment)
        return None if path is None else machine.resolved(path)

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``tvm_ffi/cpp/extension.py`` and ``sglang/jit_kernel/utils.py``, whose kernels use these headers."""
        return {
            "cache": str(self.root(environment)),
            "sglang": machine.version("sglang"),
            **machine.headers("sglang", "jit_kernel/include", "jit_kernel/csrc"),
            "flashinfer": machine.version("flashinfer-python"),
            **machine.headers("flashinfer", "data"),
            **machine.headers("deep_gemm", "include"),
            **machine.ninja_key(environment),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`. Source: ``build_ninja`` in tvm-ffi's ``cpp/extension.py``."""

        def build_ninja(original: Callable[..., Any], build_dir: str, *args: Any, **kwargs: Any) -> Any:
            # The directory is named after the module, with a hash of all that goes into it.
            directory = Path(build_dir)
            name = directory.name.rpartition("_")[0]
            with ninja.building(self, name, directory, directory / "build.ninja", directory / "lock"):
                return original(build_dir, *args, **kwargs)

        hooks.wrap(module, "build_ninja", build_ninja, "build_dir")
