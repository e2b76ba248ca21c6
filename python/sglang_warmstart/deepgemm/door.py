"""Intercept the wrapped GEMMs: see a call with all its arguments, then answer it or let it pass.

SGLang's wrapper takes DeepGEMM from a name in its own module. A door put there in DeepGEMM's place sees the calls. Once
it is removed, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_warmstart.base.guard import guarded
from sglang_warmstart.deepgemm.gemms import FUNCTIONS, Gemm, UnsupportedCallError, gemm_of_call

# (the kernel type, the call's arguments by name, what makes the real call) -> what the caller gets
OnCall = Callable[[Gemm, dict[str, Any], Callable[[], Any]], Any]


class Door:
    """DeepGEMM with ``on_call`` in front of the GEMMs that the warm-up knows. All else is DeepGEMM's own.

    Args:
        library: the module ``deep_gemm``.
        direct: a GEMM as the library made it, given the one that its module has now: others may have replaced that.
    """

    def __init__(
        self, library: Any, on_call: OnCall, direct: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._library = library
        self._on_call = on_call
        self._direct = direct

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._library, name)
        if name not in FUNCTIONS:
            return value
        function = self._direct(name, value)

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            gemm = gemm_of_call(name, kwargs.get("recipe"))
            return self._on_call(gemm, named(gemm, args, kwargs), lambda: original(*args, **kwargs))

        return guarded(f"exact-warmup: deep_gemm.{name}", call, function)


def named(gemm: Gemm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; those beyond the known parameters by their place."""
    beyond = {f"no. {i + 1}": value for i, value in enumerate(args) if i >= len(gemm.parameters)}
    return dict(zip(gemm.parameters, args, strict=False)) | beyond | dict(kwargs)


def check_names(gemm: Gemm, arguments: Mapping[str, Any]) -> None:
    """Refuse a call with an argument that might select another kernel.

    Raises:
        UnsupportedCallError: names it.
    """
    known = {*gemm.parameters, "recipe", "recipe_a", "recipe_b", "disable_ue8m0_cast"}
    for name, value in arguments.items():
        if name not in known and value is not None:
            raise UnsupportedCallError(f"the argument {name}")


def answer_with_zeros(gemm: Gemm, arguments: Mapping[str, Any]) -> None:
    """Do as if the GEMM had run on zeros."""
    for name in gemm.outputs:
        arguments[name].zero_()
