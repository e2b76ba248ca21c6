"""At DeepGEMM's door: the GEMMs of the warm-up are seen with all their arguments, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from kit.gpu_standins import DeepGemm
from sglang_warmstart.deepgemm.door import Door, answer_with_zeros, check_names, named
from sglang_warmstart.deepgemm.gemms import GEMMS, Gemm, UnsupportedCallError

BF16 = GEMMS["GEMM_NT_BF16BF16F32"]


class Visitors:
    """Somebody at the door who notes the calls, and lets each of them pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, gemm: Gemm, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        self.seen.append((gemm.kernel_type, arguments))
        return call()


def itself(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def operands(m: int = 3, n: int = 8, k: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(m, k).bfloat16(), torch.ones(n, k).bfloat16(), torch.full((m, n), torch.nan)


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
def test_each_gemm_is_seen_with_its_arguments_and_answers_as_it_does(gemm: Gemm) -> None:
    library, visitors = ModuleType("deep_gemm"), Visitors()
    setattr(library, gemm.function, lambda *args, **kwargs: (args, kwargs))
    door = Door(library, visitors, itself)
    arguments = tuple(range(len(gemm.parameters)))
    words = {gemm.parameters[-1]: arguments[-1], "signal": "a signal"}
    words |= {"recipe": list(gemm.recipe)} if gemm.recipe else {}
    assert getattr(door, gemm.function)(*arguments[:-1], **words) == (arguments[:-1], words)
    ((seen, by_name),) = visitors.seen
    assert seen == gemm.kernel_type
    assert by_name == {**dict(zip(gemm.parameters, arguments, strict=True)), **words}


def test_a_call_that_is_let_through_computes() -> None:
    deep_gemm, visitors = DeepGemm(), Visitors()
    a, b, d = operands()
    Door(deep_gemm.module, visitors, itself).bf16_gemm_nt(a, b, d)
    assert d.unique().tolist() == [4.0]
    assert len(deep_gemm.calls) == len(visitors.seen) == 1


def test_a_call_that_is_answered_does_not_reach_the_library() -> None:
    deep_gemm = DeepGemm()
    door = Door(deep_gemm.module, lambda gemm, arguments, call: answer_with_zeros(gemm, arguments), itself)
    a, b, d = operands()
    door.bf16_gemm_nt(a, b, d)
    assert d.unique().tolist() == [0.0]
    assert deep_gemm.calls == []


def test_all_else_is_the_librarys_own() -> None:
    library, visitors = DeepGemm().module, Visitors()
    library.fp8_fp4_gemm_nn = object()
    library.__version__ = "0.1.0"
    door = Door(library, visitors, itself)
    for name in ("fp8_fp4_gemm_nn", "get_num_sms", "set_num_sms", "get_mk_alignment_for_contiguous_layout"):
        assert getattr(door, name) is getattr(library, name)
    assert door.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = door.no_such_function
    assert visitors.seen == []


def test_what_has_replaced_a_gemm_in_its_module_is_gone_around() -> None:
    deep_gemm, asked = DeepGemm(), []
    own, replaced = deep_gemm.module.bf16_gemm_nt, object()
    deep_gemm.module.bf16_gemm_nt = replaced

    def direct(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        asked.append((name, function))
        return own

    Door(deep_gemm.module, Visitors(), direct).bf16_gemm_nt(*operands())
    assert asked == [("bf16_gemm_nt", replaced)]
    assert len(deep_gemm.calls) == 1


def test_arguments_beyond_the_known_ones_keep_their_place() -> None:
    assert named(BF16, (1, 2, 3, 4, 5), {"recipe": 6}) == {"a": 1, "b": 2, "d": 3, "no. 4": 4, "no. 5": 5, "recipe": 6}


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
def test_known_arguments_and_those_that_are_none_are_fine(gemm: Gemm) -> None:
    known = dict.fromkeys([*gemm.parameters, "recipe", "recipe_a", "recipe_b", "disable_ue8m0_cast"], 1)
    check_names(gemm, {**known, "signal": None, "c": None})


@pytest.mark.parametrize(
    ("args", "kwargs", "named_in_it"),
    [((), {"signal": 1}, "signal"), ((), {"max_block_n": 0}, "max_block_n"), ((1, 2, 3, 4), {}, "no. 4")],
)
def test_an_argument_that_might_select_another_kernel_is_refused_by_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], named_in_it: str
) -> None:
    with pytest.raises(UnsupportedCallError, match=f"the argument {named_in_it}"):
        check_names(BF16, named(BF16, args, kwargs))


def test_zeros_are_written_to_the_outputs_and_nothing_else() -> None:
    a, b, d = operands()
    answer_with_zeros(BF16, {"a": a, "b": b, "d": d})
    assert (a.unique().tolist(), b.unique().tolist(), d.unique().tolist()) == ([1.0], [1.0], [0.0])


def test_the_prenorm_gemm_has_two_outputs() -> None:
    x, fn, d = operands()
    squares = torch.full((3,), torch.nan)
    answer_with_zeros(GEMMS["TF32_HC_PRENORM_GEMM"], {"a": x, "b": fn, "d": d, "sqr_sum": squares})
    assert (d.unique().tolist(), squares.tolist()) == ([0.0], [0.0] * 3)
