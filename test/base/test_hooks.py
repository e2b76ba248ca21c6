"""A feature's changes are checked before they are made, reach every copy, and are taken back as they were."""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.source_edit import Edit


def make_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with the kinds of things that features change; each test has its own."""

    def double(number: int) -> int:
        return 2 * number

    class Runner:
        name = "runner"

        def run(self, number: int) -> int:
            return number + 1

        @staticmethod
        def parse(text: str) -> int:
            return int(text)

        @classmethod
        def make(cls, number: int) -> tuple[type, int]:
            return cls, number

        @property
        def size(self) -> int:
            return 1

    class FastRunner(Runner):
        pass

    Runner.__module__ = "library"
    Runner.__qualname__ = "Runner"
    return make_module(monkeypatch, "library", double=double, Runner=Runner, FastRunner=FastRunner, limits=[5])


def negated(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    return -original(*args, **kwargs)


def plus_100(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    return original(*args, **kwargs) + 100


class TestWrap:
    def test_a_function(self, library: ModuleType) -> None:
        Hooks("feature").wrap(library, "double", negated, "number")
        assert library.double(4) == -8
        assert library.double(number=4) == -8

    def test_a_method(self, library: ModuleType) -> None:
        Hooks("feature").wrap(library.Runner, "run", negated, "self, number")
        assert library.Runner().run(4) == -5
        assert library.FastRunner().run(number=4) == -5

    def test_a_static_method_stays_one(self, library: ModuleType) -> None:
        Hooks("feature").wrap(library.Runner, "parse", negated, "text")
        assert isinstance(vars(library.Runner)["parse"], staticmethod)
        assert (library.Runner.parse("7"), library.Runner().parse("7")) == (-7, -7)

    def test_a_class_method_stays_one(self, library: ModuleType) -> None:
        def one_more(original: Callable[..., Any], cls: type, number: int) -> Any:
            return original(cls, number + 1)

        Hooks("feature").wrap(library.Runner, "make", one_more, "cls, number")
        assert isinstance(vars(library.Runner)["make"], classmethod)
        assert library.Runner.make(1) == (library.Runner, 2)
        assert library.FastRunner.make(1) == (library.FastRunner, 2)

    def test_the_wrapper_looks_like_the_original_and_leads_to_it(self, library: ModuleType) -> None:
        original = library.double
        Hooks("feature").wrap(library, "double", negated, "number")
        assert library.double.__wrapped__ is original
        assert library.double.__warmstart__ == "feature"
        assert library.double.__qualname__ == original.__qualname__
        assert inspect.signature(library.double) == inspect.signature(original)
        assert not hasattr(original, "__warmstart__")

    def test_hooks_of_two_features_stack_the_later_outside(self, library: ModuleType) -> None:
        Hooks("first").wrap(library, "double", negated, "number")
        Hooks("second").wrap(library, "double", plus_100, "number")
        assert library.double(4) == 92

    def test_a_feature_wraps_a_function_once(self, library: ModuleType) -> None:
        Hooks("first").wrap(library, "double", negated, "number")
        Hooks("second").wrap(library, "double", plus_100, "number")
        for feature in ("first", "second"):
            with pytest.raises(StandsAsideError, match=r"library\.double: already patched by this feature"):
                Hooks(feature).wrap(library, "double", negated, "number")
        assert library.double(4) == 92

    @pytest.mark.parametrize(
        ("owner", "name", "reason"),
        [
            ("", "missing", "library.missing: not there"),
            ("", "limits", "library.limits: expected a function, found list"),
            ("", "Runner", "library.Runner: expected a function, found type"),
            ("Runner", "missing", "library.Runner.missing: not there"),
            ("Runner", "size", "library.Runner.size: expected a function, found property"),
        ],
    )
    def test_what_is_no_function_is_refused(self, library: ModuleType, owner: str, name: str, reason: str) -> None:
        with pytest.raises(StandsAsideError) as caught:
            Hooks("feature").wrap(getattr(library, owner) if owner else library, name, negated, "number")
        assert str(caught.value) == reason

    def test_an_inherited_method_is_refused_since_others_share_it(self, library: ModuleType) -> None:
        with pytest.raises(StandsAsideError, match="not there"):
            Hooks("feature").wrap(library.FastRunner, "run", negated, "self, number")
        assert library.Runner().run(4) == 5


def exactly(first: int, second: int) -> None: ...
def with_default(first: int, second: int, third: int = 3) -> None: ...
def with_keyword_default(first: int, second: int, *, third: int = 3) -> None: ...
def with_rest(first: int, second: int, *rest: int, **named: int) -> None: ...
def nothing() -> None: ...
def fewer(first: int) -> None: ...
def more(first: int, second: int, third: int) -> None: ...
def keyword_more(first: int, second: int, *, third: int) -> None: ...
def renamed(first: int, other: int) -> None: ...
def reordered(second: int, first: int) -> None: ...
def optional_before(zero: int = 0, first: int = 1, second: int = 2) -> None: ...


class TestParameters:
    @pytest.fixture
    def feature(self) -> Iterator[Hooks]:
        """Undone after the test: the functions above are names of this module, which a hook mends as well."""
        hooks = Hooks("feature")
        yield hooks
        hooks.undo()

    @pytest.mark.parametrize("function", [exactly, with_default, with_keyword_default, with_rest])
    def test_the_expected_ones_and_optional_ones_after_them_are_accepted(
        self, function: Callable[..., None], monkeypatch: pytest.MonkeyPatch, feature: Hooks
    ) -> None:
        library = make_module(monkeypatch, "library", function=function)
        feature.wrap(library, "function", negated, "first, second")
        assert library.function is not function

    @pytest.mark.parametrize(
        "function", [nothing, fewer, more, keyword_more, renamed, reordered, optional_before], ids=lambda f: f.__name__
    )
    def test_others_are_refused_and_named(
        self, function: Callable[..., None], monkeypatch: pytest.MonkeyPatch, feature: Hooks
    ) -> None:
        library = make_module(monkeypatch, "library", function=function)
        found = ", ".join(inspect.signature(function).parameters)
        with pytest.raises(StandsAsideError) as caught:
            feature.wrap(library, "function", negated, "first, second")
        assert str(caught.value) == f"library.function: expected parameters (first, second), found ({found})"
        assert library.function is function

    @pytest.mark.parametrize("function", [exactly, fewer])
    def test_one_of_several_forms_is_enough(
        self, function: Callable[..., None], monkeypatch: pytest.MonkeyPatch, feature: Hooks
    ) -> None:
        library = make_module(monkeypatch, "library", function=function)
        feature.wrap(library, "function", negated, "first, second", "first")
        assert library.function is not function

    def test_all_forms_are_named_in_a_refusal(self, monkeypatch: pytest.MonkeyPatch, feature: Hooks) -> None:
        library = make_module(monkeypatch, "library", function=more)
        with pytest.raises(StandsAsideError, match=r"expected parameters \(first, second\) or \(first\), found"):
            feature.wrap(library, "function", negated, "first, second", "first")

    def test_another_hook_on_the_function_does_not_hide_its_parameters(self, library: ModuleType) -> None:
        Hooks("somebody").wrap(library, "double", negated, "number")
        with pytest.raises(StandsAsideError, match=r"expected parameters \(count\), found \(number\)"):
            Hooks("feature").wrap(library, "double", plus_100, "count")
        Hooks("feature").wrap(library, "double", plus_100, "number")
        assert library.double(4) == 92


class TestCopies:
    def test_names_that_other_modules_imported_are_mended_and_restored(
        self, library: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = library.double
        user = make_module(monkeypatch, "user", double=original, twice=original, other=len)
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        assert (user.double, user.twice, user.other) == (library.double, library.double, len)
        assert user.twice(4) == -8

        hooks.undo()
        assert user.double is user.twice is library.double is original

    def test_a_copy_that_was_made_while_the_hook_was_in_place_is_restored_too(
        self, library: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = library.double
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        user = make_module(monkeypatch, "user", double=library.double)
        hooks.undo()
        assert user.double is original

    def test_a_replaced_value_is_mended_and_restored(
        self, library: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = library.Runner

        class Other:
            pass

        user = make_module(monkeypatch, "user", Runner=original)
        hooks = Hooks("feature")
        hooks.replace(library, "Runner", Other)
        assert library.Runner is user.Runner is Other
        hooks.undo()
        assert library.Runner is user.Runner is original

    def test_a_lazy_module_is_not_looked_into(self, library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        class LazyModule(ModuleType):
            def __getattribute__(self, name: str) -> Any:
                raise AssertionError(f"looked for {name}")

        monkeypatch.setitem(sys.modules, "lazy", LazyModule("lazy"))
        try:
            Hooks("feature").wrap(library, "double", negated, "number")
        finally:
            del sys.modules["lazy"]
        assert library.double(4) == -8


def step(number: int) -> int:
    return number + 1


class TestEdit:
    def test_the_edited_function_takes_the_place_of_the_original_and_gives_it_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Held in a container: a plain name of this module would be mended as well.
        holder = {"original": step}
        library = make_module(monkeypatch, "library", step=step)
        hooks = Hooks("feature")
        hooks.edit(library, "step", (Edit("number + 1", "number + 10"),), "number")
        assert library.step(1) == 11
        assert library.step.__warmstart__ == "feature"
        hooks.undo()
        assert library.step is holder["original"]
        assert step is holder["original"]

    def test_other_parameters_are_refused_before_the_source_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = make_module(monkeypatch, "library", step=step)
        with pytest.raises(StandsAsideError, match=r"expected parameters \(count\), found \(number\)"):
            Hooks("feature").edit(library, "step", (Edit("no such line", ""),), "count")
        assert library.step is step

    def test_an_edit_that_does_not_match_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = make_module(monkeypatch, "library", step=step)
        with pytest.raises(StandsAsideError, match=r"^library\.step: edit 1 expects `no such line` once"):
            Hooks("feature").edit(library, "step", (Edit("no such line", ""),), "number")
        assert library.step is step


class TestAdd:
    def test_what_is_added_is_there_until_undo(self, library: ModuleType) -> None:
        def added() -> str:
            return "added"

        hooks = Hooks("feature")
        hooks.add(library, "added", added)
        hooks.add(library.Runner, "added", staticmethod(added))
        assert (library.added(), library.Runner().added()) == ("added", "added")
        hooks.undo()
        assert not hasattr(library, "added")
        assert not hasattr(library.Runner, "added")

    @pytest.mark.parametrize("name", ["double", "limits"])
    def test_a_name_that_is_taken_is_refused(self, library: ModuleType, name: str) -> None:
        before = getattr(library, name)
        with pytest.raises(StandsAsideError, match=f"library.{name}: already there"):
            Hooks("feature").add(library, name, 1)
        assert getattr(library, name) is before

    def test_an_inherited_name_is_taken(self, library: ModuleType) -> None:
        with pytest.raises(StandsAsideError, match="already there"):
            Hooks("feature").add(library.FastRunner, "run", 1)

    def test_a_name_whose_value_is_none_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = make_module(monkeypatch, "library", nothing=None)
        with pytest.raises(StandsAsideError, match="already there"):
            Hooks("feature").add(library, "nothing", 1)


class TestReplace:
    def test_a_plain_value_is_refused_since_other_modules_may_hold_the_same_object_by_chance(
        self, library: ModuleType
    ) -> None:
        with pytest.raises(StandsAsideError, match=r"library\.limits: expected a function or class, found list"):
            Hooks("feature").replace(library, "limits", [6])

    def test_a_missing_name_is_refused(self, library: ModuleType) -> None:
        with pytest.raises(StandsAsideError, match=r"library\.missing: not there"):
            Hooks("feature").replace(library, "missing", 1)
        assert not hasattr(library, "missing")


class TestChanged:
    def test_every_change_is_listed_in_order_by_its_dotted_name_until_it_is_undone(self, library: ModuleType) -> None:
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        hooks.wrap(library.Runner, "parse", negated, "text")
        hooks.replace(library, "FastRunner", type("FastRunner", (), {}))
        hooks.add(library.Runner, "added", 1)
        hooks.made("library.Runner.field", lambda: None)
        assert hooks.changed == [
            "library.double",
            "library.Runner.parse",
            "library.FastRunner",
            "library.Runner.added",
            "library.Runner.field",
        ]
        hooks.undo()
        assert hooks.changed == []

    def test_a_refused_change_is_not_listed(self, library: ModuleType) -> None:
        hooks = Hooks("feature")
        with pytest.raises(StandsAsideError):
            hooks.wrap(library, "double", negated, "count")
        with pytest.raises(StandsAsideError):
            hooks.add(library, "double", 1)
        assert hooks.changed == []


class TestUndo:
    def test_below_the_hook_of_another_feature_a_hook_does_nothing_any_more(self, library: ModuleType) -> None:
        lower, upper = Hooks("lower"), Hooks("upper")
        lower.wrap(library, "double", lambda original, number: 100 * original(number), "number")
        upper.wrap(library, "double", negated, "number")
        assert library.double(1) == -200
        lower.undo()
        assert library.double(1) == -2
        upper.undo()
        assert library.double(1) == 2

    def test_below_the_hook_of_another_feature_a_hook_that_is_over_is_not_in_the_way_of_a_new_one(
        self, library: ModuleType
    ) -> None:
        lower, upper = Hooks("lower"), Hooks("upper")
        lower.wrap(library, "double", lambda original, number: 100 * original(number), "number")
        upper.wrap(library, "double", negated, "number")
        lower.undo()
        lower.wrap(library, "double", lambda original, number: 10 * original(number), "number")
        assert library.double(1) == -20

    def test_everything_is_the_original_again_by_identity(self, library: ModuleType) -> None:
        module = dict(vars(library))
        runner = dict(vars(library.Runner))
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        hooks.wrap(library.Runner, "run", negated, "self, number")
        hooks.wrap(library.Runner, "parse", negated, "text")
        hooks.wrap(library.Runner, "make", negated, "cls, number")
        hooks.replace(library, "FastRunner", type("FastRunner", (), {}))
        hooks.add(library, "added", 1)
        hooks.undo()

        assert dict(vars(library)) == module
        for name, value in runner.items():
            assert vars(library.Runner)[name] is value
        assert set(vars(library.Runner)) == set(runner)

    def test_the_last_change_is_taken_back_first(self) -> None:
        order: list[int] = []
        hooks = Hooks("feature")
        for number in (1, 2, 3):
            hooks.made(f"change {number}", lambda number=number: order.append(number))
        hooks.undo()
        assert order == [3, 2, 1]

    def test_a_second_undo_does_nothing(self, library: ModuleType) -> None:
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        hooks.undo()
        library.double = len
        hooks.undo()
        assert library.double is len

    def test_two_hooks_of_one_feature_on_two_functions_do_not_touch_each_other(self, library: ModuleType) -> None:
        first, second = Hooks("first"), Hooks("second")
        first.wrap(library, "double", negated, "number")
        second.wrap(library.Runner, "run", negated, "self, number")
        first.undo()
        assert library.double(4) == 8
        assert library.Runner().run(4) == -5

    def test_a_hook_that_somebody_put_on_top_is_left_in_place(
        self, library: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        user = make_module(monkeypatch, "user", double=library.double)
        ours, theirs = Hooks("ours"), Hooks("theirs")
        ours.wrap(library, "double", negated, "number")
        theirs.wrap(library, "double", plus_100, "number")
        ours.undo()
        assert library.double(4) == 108  # ours is still in the chain, and does nothing
        assert user.double is library.double
        assert library.double.__warmstart__ == "theirs"

    def test_the_inner_hook_survives_when_the_outer_one_is_taken_back(self, library: ModuleType) -> None:
        inner, outer = Hooks("inner"), Hooks("outer")
        inner.wrap(library, "double", negated, "number")
        outer.wrap(library, "double", plus_100, "number")
        outer.undo()
        assert library.double(4) == -8

    def test_what_somebody_put_in_the_place_of_an_added_name_is_left_in_place(self, library: ModuleType) -> None:
        hooks = Hooks("feature")
        hooks.add(library, "added", 1)
        library.added = 2
        hooks.undo()
        assert library.added == 2

    def test_a_change_that_somebody_took_away_does_not_stop_the_rest(self, library: ModuleType) -> None:
        original = library.double
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        hooks.add(library, "added", 1)
        del library.added
        hooks.undo()
        assert library.double is original


class TestClassOf:
    def test_a_class_is_found(self, library: ModuleType) -> None:
        assert class_of(library, "Runner") is library.Runner

    @pytest.mark.parametrize(("name", "reason"), [("missing", "not there"), ("double", "not a class")])
    def test_anything_else_is_refused(self, library: ModuleType, name: str, reason: str) -> None:
        with pytest.raises(StandsAsideError) as caught:
            class_of(library, name)
        assert str(caught.value) == f"library.{name}: {reason}"


class TestBesideHooksOfOtherPlugins:
    """SGLang's own HookRegistry, by which most plugins hook."""

    @pytest.fixture
    def registry(self) -> Any:
        module = pytest.importorskip("sglang.srt.plugins.hook_registry", reason="stacks with SGLang's own hooks")
        module.HookRegistry.reset()
        yield module.HookRegistry
        module.HookRegistry.reset()

    @pytest.fixture
    def user(self, library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        return make_module(monkeypatch, "user", double=library.double)

    def register_plus_100(self, registry: Any) -> None:
        from sglang.srt.plugins.hook_registry import HookType

        registry.register("library.double", plus_100, HookType.AROUND)
        registry.apply_hooks()

    def test_ours_after_theirs(self, registry: Any, library: ModuleType, user: ModuleType) -> None:
        self.register_plus_100(registry)
        Hooks("feature").wrap(library, "double", negated, "number")
        assert library.double(4) == -108
        assert user.double is library.double

    def test_theirs_after_ours(self, registry: Any, library: ModuleType, user: ModuleType) -> None:
        Hooks("feature").wrap(library, "double", negated, "number")
        self.register_plus_100(registry)
        assert library.double(4) == 92
        assert user.double is library.double

    def test_undo_gives_theirs_back_from_below_ours(self, registry: Any, library: ModuleType, user: ModuleType) -> None:
        self.register_plus_100(registry)
        theirs = library.double
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        hooks.undo()
        assert library.double is user.double is theirs

    def test_undo_leaves_theirs_on_top_of_ours(self, registry: Any, library: ModuleType, user: ModuleType) -> None:
        hooks = Hooks("feature")
        hooks.wrap(library, "double", negated, "number")
        self.register_plus_100(registry)
        hooks.undo()
        assert library.double(4) == 108
        assert user.double is library.double

    def test_a_feature_finds_its_own_hook_below_theirs(self, registry: Any, library: ModuleType) -> None:
        Hooks("feature").wrap(library, "double", negated, "number")
        self.register_plus_100(registry)
        with pytest.raises(StandsAsideError, match="already patched by this feature"):
            Hooks("feature").wrap(library, "double", negated, "number")

    def test_a_static_method_stays_one_below_theirs(self, registry: Any, library: ModuleType) -> None:
        from sglang.srt.plugins.hook_registry import HookType

        Hooks("feature").wrap(library.Runner, "parse", negated, "text")
        registry.register("library.Runner.parse", plus_100, HookType.AROUND)
        registry.apply_hooks()
        assert library.Runner.parse("7") == library.Runner().parse("7") == 93


def test_functions_of_this_file_are_left_as_they_were() -> None:
    """Copies are mended in every module, this one too: a test that forgot to undo would show here."""
    assert isinstance(step, FunctionType)
    assert not hasattr(step, "__warmstart__")
