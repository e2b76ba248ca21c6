"""CuTe DSL, of SGLang's own attention and of FlashInfer's and QuACK's kernels: watched where it compiles.

It has no cache of compiled kernels between processes. Whoever uses it may have one: a bundle takes SGLang's along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.monitor import compiling


class CuteDsl(Library):
    """CuTe DSL, with the cache that SGLang 0.5.20 and later have for it (``kernels/jit/cute_aot_cache.py``).

    An entry of that cache is a file ``FINGERPRINT/NAME/HASH.o``, renamed into place. The fingerprint is a hash of
    SGLang's sources, of Python's, CuTe DSL's and tvm-ffi's versions, CUDA's, and the architecture, but of no path.

    Building ahead: ``cute.compile`` needs no GPU where ``CUTE_DSL_ARCH`` names the architecture. SGLang's lock is a
    flock of ``HASH.lock`` beside the entry.
    """

    name = "cute-dsl"
    distributions = ("nvidia-cutlass-dsl",)
    left_out = ("*.lock", "*.tmp.o")
    module = "cutlass.base_dsl.compiler"
    hooks: ClassVar[Mapping[str, str]] = {
        "cutlass.base_dsl.compiler.Compiler.compile": "CuTe DSL has no hook; all that it compiles goes through here"
    }
    remedy = (
        "a forward of this kind before the server is ready would have, or, for SGLang's own attention from 0.5.20 on, "
        "its cache out of a bundle (bundle pack --include cute-dsl)"
    )

    def root(self, environment: Environment) -> Path | None:
        """SGLang's own cache, if the environment names it: its default is another in each release.

        Source: ``get_jit_cache`` in ``kernels/jit/cute_aot_cache.py``. With an empty variable there is none.
        """
        named = environment.get("SGLANG_CUTE_AOT_CACHE_DIR")
        path = machine.expanded(named, environment) if named else None
        return None if path is None else machine.absolute(path)

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``_compute_source_fingerprint`` in ``kernels/jit/cute_aot_cache.py``."""
        return {
            "cute-dsl": machine.version(*self.distributions),
            # The first is installed beside the second where it is asked for.
            "CUDA": machine.version("nvidia-cutlass-dsl-libs-cu13", "nvidia-cutlass-dsl-libs-cu12"),
            "tvm-ffi": machine.version("apache-tvm-ffi"),
            "sglang": machine.version("sglang"),
            **machine.host(),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`. Source: ``Compiler`` in CuTe DSL's ``base_dsl/compiler.py`` (4.5 to 4.8)."""

        def compile(original: Callable[..., Any], compiler: Any, ir: Any, *args: Any, **kwargs: Any) -> Any:
            with compiling(self, _name(ir)):
                return original(compiler, ir, *args, **kwargs)

        hooks.wrap(class_of(module, "Compiler"), "compile", compile, "self, module, pipeline")


def _name(module: Any) -> str:
    """The host function of a module, whose name holds the types that it is specialised on."""
    with contextlib.suppress(Exception):  # what it holds differs between releases
        for operation in module.body.operations:
            if "sym_name" in operation.attributes and operation.name != "gpu.module":
                return str(operation.attributes["sym_name"].value)
    return "a kernel"
