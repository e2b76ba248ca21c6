"""A module of SGLang's own JIT (0.5.18 and later), built again by SGLang's ``load_jit``, without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.libraries.anchors import Anchors, NoAnchorError, anchored, anchors_of, placed
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import BuildError

_LOADER = "sglang.kernels.jit.utils.compile.loader"


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module as ``load_jit`` has resolved it; paths by anchors.

    Args:
        arch: of the GPU: major, minor and suffix.
        spec: SGLang's ``BuildSpec`` (``kernels/jit/utils/compile/spec.py``), as values that JSON has.
    """

    arch: tuple[int, int, str]
    spec: dict[str, bool | list[Any]]


def described(spec: Any, root: Path, environment: Environment) -> dict[str, Any] | None:
    """The form of a recipe for a ``BuildSpec``; None if it has no form in JSON.

    Args:
        root: of the library's cache.
    """
    from sglang.kernels.jit.utils.arch import get_jit_cuda_arch

    arch = get_jit_cuda_arch()
    try:
        text = anchored(msgspec.json.encode(spec).decode(), anchors_of(root, environment))
        module = Module((arch.major, arch.minor, arch.suffix), msgspec.json.decode(text))
    except (NoAnchorError, TypeError):
        return None
    return dict(msgspec.to_builtins(module))


def prepare(_form: Mapping[str, Any]) -> None:
    """Import SGLang's loader, and torch with it, which takes seconds.

    Only what it needs: SGLang's package imports transformers, and its loader asks torch not to compile it, for which
    torch imports its compiler. That takes twice as long as all the rest, and the longest builds wait for it.
    """
    try:
        _leave_out_package("sglang")
        with _without_dynamo():
            importlib.import_module(_LOADER)
    except Exception:
        # Whatever it needs of the package in another release.
        for name in [each for each in sys.modules if each.partition(".")[0] == "sglang"]:
            del sys.modules[name]
        importlib.import_module(_LOADER)


def _leave_out_package(name: str) -> None:
    """Have modules of a package imported in this process without the package's own being run."""
    spec = importlib.util.find_spec(name)
    if spec is not None and name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """``torch.compiler.disable`` does nothing: nobody compiles a model here."""
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = lambda function: function
    try:
        yield
    finally:
        torch.compiler.disable = disable


def build(form: Mapping[str, Any], root: Path | None, environment: Environment) -> None:
    """Have SGLang build it and put it into its cache, under its own lock. It loads the library, too.

    Args:
        root: of the library's cache.

    Raises:
        BuildError: it cannot be.
    """
    if root is None:
        raise BuildError("SGLang's JIT has no cache here")
    try:
        _load(msgspec.convert(form, Module), anchors_of(root, environment))
    except BuildError:
        raise
    except Exception as error:
        # As text: what it raises need not survive the way to another process.
        raise BuildError(f"{type(error).__name__}: {first_line(error)}") from None


def _load(module: Module, anchors: Anchors) -> None:
    from sglang.kernels.jit.utils.arch import get_default_target_flags, override_jit_cuda_arch
    from sglang.kernels.jit.utils.compile import loader, ninja, paths
    from sglang.kernels.jit.utils.compile.spec import BuildSpec

    text = placed(msgspec.json.encode(module.spec).decode(), anchors)
    spec = msgspec.json.decode(text, type=BuildSpec)
    with override_jit_cuda_arch(*module.arch):
        defaults = {
            "extra_cflags": (spec.cflags, paths.DEFAULT_CFLAGS),
            "extra_cuda_cflags": (spec.cuda_cflags, get_default_target_flags()),
            "extra_ldflags": (spec.ldflags, paths.DEFAULT_LDFLAGS),
            "extra_include_paths": (spec.include_paths, paths.DEFAULT_INCLUDE),
        }
        extra = {}
        for name, (words, usual) in defaults.items():
            if list(words[: len(usual)]) != list(usual):
                raise BuildError(f"SGLang's own flags are others here: {usual}")
            extra[name] = list(words[len(usual) :])
        with _only(ninja, spec):
            loader.load_jit(
                *spec.module_args,
                cpp_files=list(spec.cpp_files),
                cuda_files=list(spec.cuda_files),
                cpp_wrappers=list(spec.cpp_wrappers),
                cuda_wrappers=list(spec.cuda_wrappers),
                header_only=spec.header_only,
                **extra,
            )


@contextlib.contextmanager
def _only(ninja: Any, spec: Any) -> Any:
    """SGLang builds this, or nothing: what it makes of the arguments must be what it made of them before."""
    generate = ninja.generate

    def checked(made: Any) -> Any:
        if made != spec:
            raise BuildError("SGLang makes another module of the same arguments here")
        return generate(made)

    ninja.generate = checked
    try:
        yield
    finally:
        ninja.generate = generate
