"""The rooms of the package: which of them may use which, and what each needs to be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import sglang_warmstart

PACKAGE = Path(sglang_warmstart.__file__).parent
# From the ground up: a room uses those before it.
ROOMS = ("base", "deepgemm", "libraries", "node", "bundle", "report", "sglang", "plugin", "cli")
# These know nothing of SGLang, and call torch and DeepGEMM only where they need them.
WITHOUT_SGLANG = ("base", "deepgemm", "libraries", "node")
# They call DeepGEMM, or torch, when they are imported: in recording children alone.
IN_CHILDREN = {
    f"sglang_warmstart.deepgemm.{name}" for name in ("record.gpu", "nogpu.library", "nogpu.marked", "nogpu.room")
}

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sglang", "torch", "deep_gemm"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    __import__(name)
"""


def modules_of(room: str) -> list[str]:
    """The modules of a room, by full name."""
    paths = [PACKAGE / f"{room}.py"] if room == "plugin" else sorted((PACKAGE / room).rglob("*.py"))
    return [".".join(("sglang_warmstart", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in paths]


def imports_of(module: str) -> set[str]:
    """What a module imports of this package, anywhere in it."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return {name for name in found if name.startswith("sglang_warmstart.")}


def test_every_module_is_in_a_room() -> None:
    found = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__", "py"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_only_those_below_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    wrong = [
        f"{module} imports {name}"
        for module in modules_of(room)
        for name in sorted(imports_of(module))
        if name.split(".")[1] in ROOMS and name.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.by_plugin
@pytest.mark.parametrize("room", WITHOUT_SGLANG)
def test_a_room_below_sglang_is_imported_without_sglang_torch_and_deep_gemm(room: str) -> None:
    modules = [module for module in modules_of(room) if module not in IN_CHILDREN]
    command = [sys.executable, "-c", WITHOUT, *(module.removesuffix(".__init__") for module in modules)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
