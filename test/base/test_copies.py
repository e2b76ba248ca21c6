"""What modules took from each other is replaced wherever it is; one look serves all that is replaced together."""

import sys
import threading
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_warmstart.base.copies import mend_copies, mended_together


class Thing:
    """Something that modules hold. To be equal is not to be the same."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    found = [ModuleType(name) for name in ("first", "second")]
    for module in found:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def test_every_name_in_every_module_follows_and_nothing_else(modules: list[ModuleType]) -> None:
    old, other, new = Thing(), Thing(), Thing()
    for module in modules:
        vars(module).update(taken=old, alias=old, other=other)
    mend_copies(old, new)
    for module in modules:
        assert module.taken is new and module.alias is new and module.other is other


def test_together_they_are_replaced_at_the_end_of_the_outermost(modules: list[ModuleType]) -> None:
    old, new = Thing(), Thing()
    modules[0].taken = old
    with mended_together():
        with mended_together():
            mend_copies(old, new)
        assert modules[0].taken is old
    assert modules[0].taken is new


def test_also_where_something_fails_within(modules: list[ModuleType]) -> None:
    old, new = Thing(), Thing()
    modules[0].taken = old
    with pytest.raises(ZeroDivisionError), mended_together():
        mend_copies(old, new)
        raise ZeroDivisionError
    assert modules[0].taken is new


def test_another_thread_does_not_wait_for_this_one(modules: list[ModuleType]) -> None:
    old, new = Thing(), Thing()
    modules[0].taken = old
    with mended_together():
        thread = threading.Thread(target=mend_copies, args=(old, new))
        thread.start()
        thread.join()
        assert modules[0].taken is new


@given(replaced=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4))
@settings(max_examples=25, deadline=None)  # each look goes through all modules of this process
def test_together_comes_to_the_same_as_one_by_one(replaced: list[tuple[int, int]]) -> None:
    things = [Thing() for _ in range(4)]
    alone, together = ModuleType("alone"), ModuleType("together")
    with pytest.MonkeyPatch.context() as patch:
        for module in (alone, together):
            vars(module).update({f"thing{number}": thing for number, thing in enumerate(things)})
        patch.setitem(sys.modules, "alone", alone)
        for old, new in replaced:
            mend_copies(things[old], things[new])
        patch.delitem(sys.modules, "alone")
        patch.setitem(sys.modules, "together", together)
        with mended_together():
            for old, new in replaced:
                mend_copies(things[old], things[new])
    for number in range(4):
        assert getattr(alone, f"thing{number}") is getattr(together, f"thing{number}")
