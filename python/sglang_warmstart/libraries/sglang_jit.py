"""SGLang's own JIT (``sglang/kernels/jit``, 0.5.18 and later): watched where it runs ninja. Its cache can be moved.

Earlier releases build their kernels by tvm-ffi (:mod:`.tvm_ffi`).
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.events import now
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine, sglang_jit_ahead
from sglang_warmstart.libraries import recipe as recipes
from sglang_warmstart.libraries.library import Library, covered_by_forward_or_bundle
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.monitor import compiling

_COMPILE = Path("kernels", "jit", "utils", "compile", "ninja.py")


class SglangJit(Library):
    """SGLang's own JIT.

    An entry is ``TARGET/MODULE/build-KEY/deps-KEY``, a directory that is renamed into place. Both keys are hashes of
    contents: of ninja's file, in which known directories have names, the sources, the versions of both compilers and of
    some packages; and of all that the compiler read. What tells a hit is ``sgl_deps.json``, a list of the latter.

    Its lock is a flock of ``.lock`` beside the entries.
    """

    name = "sglang-jit"
    distributions = ("sglang",)
    # A hit needs the library and the list.
    left_out = ("*/.lock", "*/.staging-*", "*.o", "*.o.d", "*/.ninja_*")
    module = "sglang.kernels.jit.utils.compile.ninja"
    hooks: ClassVar[Mapping[str, str]] = {
        "sglang.kernels.jit.utils.compile.ninja.build": "SGLang's JIT (0.5.18 and later) has no hook; it comes here "
        "only with what its cache does not have",
        "sglang.kernels.jit.utils.compile.ninja.generate": "called for every module before SGLang looks into its "
        "cache: what is to be built again is written down here",
    }
    remedy = covered_by_forward_or_bundle(name)
    ahead = sglang_jit_ahead.__name__
    # Read by SGLang and by what it takes headers from. Not all of SGLang's: each of its ranks has some of its own.
    variables = ("SGLANG_JIT_*", "SGLANG_CACHE_DIR", "TVM_FFI_*", "FLASHINFER_*")

    @property
    def is_installed(self) -> bool:
        """Whether this SGLang has it."""
        package = machine.package("sglang")
        return package is not None and (package / _COMPILE).is_file()

    def root(self, environment: Environment) -> Path | None:
        """Source: ``kernels/jit/utils/compile/cache.py``. An empty variable is as none; without a home, it fails.

        Its default does not follow ``SGLANG_CACHE_DIR``.
        """
        path = machine.expanded(environment.get("SGLANG_JIT_CACHE_DIR") or "~/.cache/sglang/jit", environment)
        return None if path is None else machine.absolute(path)

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``_environment_fingerprint`` in ``kernels/jit/utils/compile/cache.py``; whose headers are read."""
        return {
            "sglang": machine.version("sglang"),
            "torch": machine.version("torch"),
            "tvm-ffi": machine.version("apache-tvm-ffi"),
            "flashinfer": machine.version("flashinfer-python"),
            "deep_gemm": machine.version("sgl-deep-gemm", "deep-gemm"),
            "mathdx": machine.version("nvidia-mathdx"),
            "CUDA": machine.cuda_version(machine.cuda_home(environment)),
            "nvcc": machine.program_version(str(machine.cuda_home(environment) / "bin" / "nvcc"), environment),
            "CXX": machine.program_version(environment.get("CXX", "c++"), environment),
            **machine.host(),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`.

        Source: ``load_jit`` in ``loader.py`` beside it. It looks into the cache, takes its lock, looks again, and then
        calls this. ``SGLANG_CRASH_ON_JIT_COMPILE`` (0.5.20 and later) refuses between the two looks: also what another
        rank is about to publish, and with no word of a server that is ready.
        """

        def build(original: Callable[..., Any], *, spec: Any, **kwargs: Any) -> Any:
            at = now()
            with compiling(self, str(spec.module_name)):
                built = original(spec=spec, **kwargs)
            self._tell(spec, kwargs["build_file"], now() - at)
            return built

        def generate(original: Callable[..., str], spec: Any) -> str:
            text = original(spec)
            self._tell(spec, text)
            return text

        hooks.wrap(module, "build", build, "spec, build_dir, build_file")
        hooks.wrap(module, "generate", generate, "spec")

    def _tell(self, spec: Any, text: str, seconds: float = 0.0) -> None:
        """Hand over the recipe of a module, with the place of its entry."""
        if not recipes.is_heard():
            return
        with contextlib.suppress(Exception):  # whatever a fork's JIT looks like, it builds
            from sglang.kernels.jit.utils.compile import cache

            root = self.root(os.environ)
            form = None if root is None else sglang_jit_ahead.described(spec, root, os.environ)
            if root is not None and form is not None:
                key = cache.compute_build_key(spec, build_file=text)
                scope = cache.build_key_dir(module_name=spec.module_name, build_key=key)
                made = f"{glob.escape(str(scope.relative_to(root)))}/deps-*/*.so"
                recipes.tell(self.recipe(str(spec.module_name), form, made, seconds))
