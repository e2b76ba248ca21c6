"""Inductor, torch.compile's compiler: watched where it makes code for a graph that its cache does not have."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.library import Library, covered_by_forward_or_bundle
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.monitor import compiling

# A stack in a node's `meta` is the text of a traceback, the innermost line last.
_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Inductor(Library):
    """Inductor.

    An entry of the cache of graphs (``fxgraph``, ``aotautograd``) is a file that is named by a hash of the graph, of
    torch's own files, its settings and the GPU. It holds the code. The other directories hold what is made of that.
    Inductor's Triton kernels may be compiled in other processes. What is waited for is seen here all the same.

    Building ahead: nothing builds a graph but the code that torch.compile traces.
    """

    name = "inductor"
    distributions = ("torch",)
    left_out = ("locks", "*.lock", "*.tmp", "*/tmp.pid_*", "*.tmp.pid_*")
    module = "torch._inductor.compile_fx"
    hooks: ClassVar[Mapping[str, str]] = {
        "torch._inductor.compile_fx.fx_codegen_and_compile": "torch.compile's hooks do not say whether the cache has a "
        "graph; Inductor comes here only if it has not"
    }
    remedy = covered_by_forward_or_bundle(name)

    def root(self, environment: Environment) -> Path | None:
        """Source: ``cache_dir`` in ``torch/_inductor/runtime/cache_dir_utils.py``.

        An empty variable is the working directory: nothing tells its entries from what else lies there.
        """
        named = environment.get("TORCHINDUCTOR_CACHE_DIR")
        if named is not None:
            return machine.absolute(Path(named)) if named else None
        above = environment.get("TMPDIR") or tempfile.gettempdir()
        return machine.absolute(Path(above, f"torchinductor_{_user(environment)}"))

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``FxGraphHashDetails`` in ``torch/_inductor/codecache.py``. Triton's entries in it hold paths."""
        return {
            "torch": machine.version("torch"),
            "triton": machine.version("triton", "pytorch-triton"),
            "sglang": machine.version("sglang"),  # whose code the graphs are of
            "cache": str(self.root(environment)),
            **machine.host(),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`. Source: ``_compile_fx_inner`` in torch's ``_inductor/compile_fx.py``."""

        def fx_codegen_and_compile(original: Callable[..., Any], gm: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            name, shape = "a graph", ""
            with contextlib.suppress(Exception):  # what a graph holds differs between releases
                name, shape = _name(gm), _shape(inputs)
            with compiling(self, name, shape):
                return original(gm, inputs, *rest, **named)

        hooks.wrap(module, "fx_codegen_and_compile", fx_codegen_and_compile, "gm, example_inputs, inputs_to_check")


def _user(environment: Environment) -> str:
    # As getpass.getuser, which reads no environment but this process's.
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if environment.get(name):
            return _plain(environment[name])
    try:
        return _plain(pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:
        return f"uid_{os.getuid()}"


def _plain(user: str) -> str:
    return re.sub(r'[\\/:*?"<>|]', "_", user)


def _name(graph: Any) -> str:
    """The function that a graph was traced from, with its place: ``forward (layer.py:12)``."""
    for node in reversed(list(graph.graph.nodes)):
        found = _LINE.findall(node.meta.get("stack_trace") or "")
        if found:
            path, line, function = found[-1]
            return f"{function} ({Path(path).name}:{line})"
    return "a graph"


def _shape(inputs: Any) -> str:
    """The shapes of a graph's tensors; a name stands for a size that it is not specialised on."""
    shapes = [f"({', '.join(map(str, each.shape))})" for each in inputs if hasattr(each, "shape")]
    return ", ".join(dict.fromkeys(shapes))
