"""DeepGEMM, the library of exact warm-up. A bundle has its kernels as a plan with markers, not as files of its cache.

Source: ``csrc/jit/compiler.hpp`` of DeepGEMM 0.1.x.
"""

from __future__ import annotations

from pathlib import Path

from sglang_warmstart.deepgemm.dialects import FIRST_JIT, Dialect, UnknownJitError, dialect_of
from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import Recipe


class DeepGemm(Library):
    """DeepGEMM. It differs from the others in four ways, which nobody else needs to know.

    - ``in_files`` is False. A kernel's directory is named by the compiler's flags, and so by where DeepGEMM is
      installed. A bundle has the kernels under the names of its plan, and gives them their names where it is restored.
    - ``root`` is DeepGEMM's own rule. In a server, SGLang sets the variable before DeepGEMM is imported, and
      :func:`sglang_warmstart.sglang.caches.deep_gemm_cache` says to what.
    - There is no ``module``: what shows a compile is the compiler command (:class:`.deep_gemm_watch.DeepGemmWatch`). It
      has to be in place when exact warm-up has asked for the real one and before the first kernel, a moment that only
      SGLang knows (:mod:`sglang_warmstart.sglang.jit_monitor`).

    - A recipe is a target, and the node's service itself makes its kernels
      (:mod:`sglang_warmstart.node.planned_targets`).
    """

    name = "deep-gemm"
    distributions = ("sgl-deep-gemm", "deep-gemm")
    in_files = False
    remedy = "exact warm-up would have; `sglang-warmstart doctor` says why it is not at work"

    def root(self, environment: Environment) -> Path | None:
        """See :class:`Library`. An empty variable is as none."""
        named = environment.get("DG_JIT_CACHE_DIR")
        if named:
            # The first of several is the one that is written.
            return machine.absolute(installed_dialect().roots(named)[0])
        home = machine.home(environment)
        return None if home is None else machine.absolute(home / ".deep_gemm")

    @property
    def has_recipes(self) -> bool:
        """See :class:`Library`."""
        return True

    def is_made(self, recipe: Recipe, environment: Environment) -> bool:
        """See :class:`Library`. Which kernels a target has, and whether they are there, the service finds out."""
        return False

    def versions(self, environment: Environment) -> dict[str, str]:
        """See :class:`Library`. SGLang says which targets there are; what kernels they have, the DeepGEMM of today."""
        return {"sglang": machine.version("sglang")}

    def key(self, environment: Environment) -> dict[str, str]:
        """The part of a marker's identity that does not depend on a GPU (:mod:`sglang_warmstart.deepgemm.identity`)."""
        # Here and not above: a rank that only watches does not need them.
        from sglang_warmstart.deepgemm.compiler import CompilerError, find
        from sglang_warmstart.deepgemm.identity import build_hash

        package, dialect = machine.package("deep_gemm"), installed_dialect()
        try:
            compiler = find(environment, dialect=dialect).version
        except CompilerError:
            compiler = "not there"
        return {
            "build": build_hash(package) if package else machine.NOT_INSTALLED,
            "place": str(package),
            "compiler": compiler,
            **dialect.settings(environment),
        }


def installed_dialect() -> Dialect:
    """That of the installed DeepGEMM; the first where none is installed, or one that nobody knows."""
    package = machine.package("deep_gemm")
    try:
        return FIRST_JIT if package is None else dialect_of(package)
    except UnknownJitError:
        return FIRST_JIT
