"""Triton's kernels, built by recipe: what a compile was made from, as JSON, and the same compile without a GPU.

The name of an entry in Triton's cache is a hash over the function's source and all it refers to, the types of its
arguments, what it is specialised on, the options and the GPU's architecture. ``triton.compile`` takes just these, and
never asks the GPU. So the same call gives the same entry, in whichever process it is made.

What builds (:func:`prepare`, :func:`build`) is for a process of its own: torch is told which GPU to answer for.
"""

from __future__ import annotations

import gc
import glob
import importlib
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import BuildError

# Options that name files, or are arguments of a program: a recipe, which comes from a file, has none of them.
_OUTSIDE = frozenset({"extern_libs", "ir_override", "ptx_options"})
_INT64 = 1 << 63  # JSON's whole numbers, as msgspec writes them
_UNWRAPPED = 8  # decorators around one kernel; nobody has more than three


class _IndescribableError(Exception):
    """It has no form."""


def described(src: Any, options: Any, target: Any) -> dict[str, Any] | None:
    """What a kernel is compiled from, as values that JSON has; None if another process could not find it.

    Not described: a function that is not found by its name in a module that can be imported (local functions,
    Inductor's generated code, ``__main__``), Gluon, IR from a file, GPUs other than NVIDIA's, options that name files
    or are arguments of ptxas, and values of types that are not listed in :func:`_encoded`.

    Args:
        src: the ``ASTSource``.
        options: the backend's, as they were before the compile. What the listener is told will not do: a kernel with
            specialised warps changes ``num_warps`` there.
        target: the ``GPUTarget``.
    """
    from triton.compiler.compiler import ASTSource

    if type(src) is not ASTSource or target.backend != "cuda":
        return None
    try:
        module, name = _named(src.fn)
        return {
            "module": module,
            "function": name,
            "signature": [[argument, _encoded(kind)] for argument, kind in src.signature.items()],
            "constants": _encoded_by_path(src.constants),
            # Their order is part of the hash.
            "attrs": _encoded_by_path(src.attrs),
            "options": {option: _encoded(value) for option, value in _plain_options(vars(options)).items()},
            "target": {"backend": target.backend, "arch": _int(target.arch), "warp_size": _int(target.warp_size)},
        }
    except _IndescribableError:
        return None


def prepare(form: Mapping[str, Any]) -> None:
    """Do what builds have in common: import Triton and the kernel's module, and hash Triton's own files.

    To be called in a process that forks for each build. It compiles nothing, and asks no GPU.

    Raises:
        BuildError: it cannot be done.
    """

    def share() -> None:
        source, target, options = _source(form)
        from triton.compiler import code_generator, compiler  # noqa: F401 (the first compile imports it)

        # Triton keeps the parts of the key. That of its own files, 500 MB, takes longer than to build a kernel.
        backend = compiler.make_backend(target)
        parsed = backend.parse_options(options)
        compiler.get_cache_key(source, backend, parsed, env_vars={})
        # Both import modules.
        backend.get_codegen_implementation(parsed)
        backend.get_module_map()

    _one_line(share)


def build(form: Mapping[str, Any], _root: Path | None, _environment: Environment) -> str:
    """Compile the kernel into Triton's cache.

    Returns:
        Where it is, as ``Recipe.made``: a hash that Triton's own files are part of.

    Raises:
        BuildError: it cannot be done.
    """

    def compile_it() -> str:
        source, target, options = _source(form)
        import triton

        return entry_of(triton.compile(source, target=target, options=options).metadata_group)

    # In a fork, the collector would look at all that the process has, and so copy it: 0.4 s.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return str(_one_line(compile_it))
    finally:
        if was_enabled:
            gc.enable()


def entry_of(group: Mapping[str, str]) -> str:
    """The file of an entry that is written last, below the root of the cache.

    Source: ``put_group`` in Triton's ``runtime/cache.py``.
    """
    for name, path in group.items():
        if name.endswith(".json"):
            return f"{glob.escape(Path(path).parent.name)}/__grp__{glob.escape(name)}"
    return ""


def _one_line(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except BuildError:
        raise
    # A module may end the process that imports it.
    except (Exception, SystemExit) as error:
        # As text: what Triton raises need not survive the way to another process.
        raise BuildError(f"{type(error).__name__}: {first_line(error)}") from None


# Writing


def _named(function: Any) -> tuple[str, str]:
    """The module and the qualified name of a function that Triton compiles."""
    from triton.runtime.jit import ConstexprFunction, JITFunction

    if type(function) not in (JITFunction, ConstexprFunction):
        raise _IndescribableError
    module, name = function.fn.__module__, function.fn.__qualname__
    loaded = sys.modules.get(module)
    # Inductor's modules are made by hand and have none; that of a script has another name.
    spec = getattr(loaded, "__spec__", None)
    if spec is None or spec.name != module or not _is_dotted(module) or not _is_dotted(name):
        raise _IndescribableError
    try:
        is_it = _attribute(loaded, name) is function
    except BuildError:
        is_it = False
    if not is_it:
        raise _IndescribableError
    return module, name


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without what leads into Triton's own directory: Triton adds that itself, wherever it is."""
    import triton

    own = Path(triton.__file__).parent
    libraries = dict(options.get("extern_libs") or ()).values()
    if not all(Path(each).is_relative_to(own) for each in libraries):
        raise _IndescribableError
    others = {name: value for name, value in options.items() if name != "extern_libs"}
    if any(others.get(name) for name in _OUTSIDE):
        raise _IndescribableError
    return others


def _encoded_by_path(values: Mapping[Any, Any]) -> list[list[Any]]:
    return [[[_int(place) for place in path], _encoded(value)] for path, value in values.items()]


def _int(value: Any) -> int:
    if type(value) is not int or not -_INT64 <= value < _INT64:
        raise _IndescribableError
    return value


def _encoded(value: Any) -> Any:
    """A value as JSON. What JSON has no type for is an object with one name, that of the type.

    Types are compared for equality: the hash is over ``str`` of a value, and that of a subclass may be anything.
    """
    import triton.language as tl
    from triton.runtime.jit import JITCallable

    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return _int(value)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is tuple:
        return {"tuple": [_encoded(each) for each in value]}
    if type(value) is list:
        return [_encoded(each) for each in value]
    if type(value) is tl.dtype:
        return {"dtype": value.name}
    if type(value) is tl.constexpr:
        return {"constexpr": _encoded(value.value)}
    if isinstance(value, JITCallable):
        return {"function": list(_named(value))}
    raise _IndescribableError


# Reading: a form comes from a file


def _source(form: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The source, the target and the options of a form."""
    function, target = _found(form)
    from triton.compiler import ASTSource

    signature = {_text(name): _type(_decoded(kind)) for name, kind in _pairs(form, "signature")}
    if set(signature) != set(function.arg_names):
        raise BuildError(f"{_text(form['function'])} takes other arguments by now: {', '.join(function.arg_names)}")
    constants = _decoded_by_path(form, "constants")
    attrs = _decoded_by_path(form, "attrs")
    paths = (path for values in (constants, attrs) for path in values)
    if any(place >= len(function.arg_names) for place, *_ in paths):
        raise BuildError("the recipe has a path to an argument that is not there")
    options = {_text(name): _decoded(value) for name, value in _object(form, "options").items()}
    for name in _OUTSIDE & {name for name, value in options.items() if value}:
        raise BuildError(f"an option that no recipe has: {name}")
    return ASTSource(function, signature, constants, attrs), target, options


def _found(form: Mapping[str, Any]) -> tuple[Any, Any]:
    """The function and the target of a form."""
    if not isinstance(form, Mapping):
        raise BuildError("the recipe is not an object")
    place = _object(form, "target")
    backend, arch, warp_size = (place.get(name) for name in ("backend", "arch", "warp_size"))
    if backend != "cuda" or type(arch) is not int or type(warp_size) is not int or not 10 <= arch < 1000:
        raise BuildError(f"no GPU of NVIDIA's: {place}")
    module, name = form.get("module"), form.get("function")
    if not isinstance(module, str) or not isinstance(name, str):
        raise BuildError("the recipe names no function")
    _answer_for(arch, warp_size)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    function = _function(module, name)
    if type(function) is not JITFunction:
        raise BuildError(f"{module}.{name} is no kernel of Triton's")
    return function, GPUTarget(backend, arch, warp_size)


def _function(module: str, name: str) -> Any:
    from triton.runtime.jit import ConstexprFunction, JITFunction

    if not _is_dotted(module) or not _is_dotted(name):
        raise BuildError(f"not a name: {module[:80]!r}, {name[:80]!r}")
    found = _attribute(importlib.import_module(module), name)
    if type(found) not in (JITFunction, ConstexprFunction):
        raise BuildError(f"{module}.{name} is no kernel of Triton's")
    return found


def _attribute(module: Any, name: str) -> Any:
    """What a qualified name leads to; what Triton's decorators made of a kernel is taken off."""
    from triton.runtime.jit import JITCallable, KernelInterface

    found = module
    for part in name.split("."):
        # Not by getattr: what a module or a class computes is not looked at.
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    for _ in range(_UNWRAPPED):
        if isinstance(found, JITCallable) or not isinstance(found, KernelInterface):
            break
        found = getattr(found, "fn", None)  # of an Autotuner, of Heuristics
    if found is None:
        raise BuildError(f"{getattr(module, '__name__', 'the module')} has no {name}")
    return found


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _object(form: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = form.get(name)
    if not isinstance(found, Mapping):
        raise BuildError(f"the recipe's {name} is not an object")
    return found


def _pairs(form: Mapping[str, Any], name: str) -> Iterable[tuple[Any, Any]]:
    found = form.get(name)
    if not isinstance(found, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise BuildError(f"the recipe's {name} is not a list of pairs")
    return [(first, second) for first, second in found]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BuildError(f"not a name: {str(value)[:80]!r}")
    return value


def _type(value: Any) -> Any:
    """The type of an argument: text, or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_type(each) for each in value)
    return _text(value)


def _decoded_by_path(form: Mapping[str, Any], name: str) -> dict[tuple[int, ...], Any]:
    found = {}
    for path, value in _pairs(form, name):
        if not isinstance(path, list) or not path or not all(type(place) is int and place >= 0 for place in path):
            raise BuildError(f"the recipe's {name} has a path that is none: {str(path)[:80]}")
        found[tuple(path)] = _decoded(value)
    return found


def _decoded(value: Any) -> Any:
    import triton.language as tl

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind == "tuple" and isinstance(inner, list):
            return tuple(_decoded(each) for each in inner)
        if kind == "dtype" and isinstance(inner, str):
            return tl.dtype(inner)
        if kind == "constexpr":
            return tl.constexpr(_decoded(inner))
        if kind == "function" and isinstance(inner, list) and len(inner) == 2:
            return _function(_text(inner[0]), _text(inner[1]))
    raise BuildError(f"not a value of a recipe: {str(value)[:80]}")


# The GPU that modules see while they are imported

_answers_for: list[tuple[int, int]] = []


def _answer_for(arch: int, warp_size: int) -> None:
    """Let the modules that are imported here believe in the GPU that is built for; ask no real one.

    Many look for a GPU while they are imported, and define other kernels, or none, where there is none. Asking the real
    one would make a context on it, which takes memory, and would make forking impossible.

    Raises:
        BuildError: this process answers for another GPU already, and has modules that know.
    """
    if (arch, warp_size) in _answers_for:
        return
    if _answers_for:
        raise BuildError(f"this process builds for sm_{_answers_for[0][0]}, not for sm_{arch}")
    import torch

    # Whatever is asked beyond the answers below finds no GPU, and so touches none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    capability, gpu = divmod(arch, 10), f"NVIDIA sm_{arch}"
    # What the architecture does not say is not there: better no kernel than one that was guessed.
    properties = types.SimpleNamespace(name=gpu, major=capability[0], minor=capability[1], warp_size=warp_size)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": gpu,
        "get_device_properties": properties,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, _answer=answer, **_kwargs: _answer)
    _answers_for.append((arch, warp_size))

    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(_Driver(GPUTarget("cuda", arch, warp_size)))


class _Driver:
    """Triton's driver, as far as a module asks it while it is imported."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0
