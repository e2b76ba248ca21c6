"""Beside a patched SGLang there is no plugin: its modules, by their names, are those in SGLang's tree."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_IN_SGLANG = "sglang.srt.warmstart"


class _InSGLang(MetaPathFinder, Loader):
    """Finds each module where the patches put it. It is the same module under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_IN_SGLANG + spec.name.removeprefix(__name__))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importlib has just put the alias's there


sys.meta_path.insert(0, _InSGLang())
