"""A dataclass gains a field in place, as if it had been declared with it, and loses it again."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import pytest
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.sglang.dataclass_field import add_field


@dataclass
class Arguments:
    """Shaped as SGLang's ServerArgs: one required field, defaults, a factory, a class variable, a method."""

    path: str
    size: int = 1
    hosts: list[str] = field(default_factory=list)
    limit: ClassVar[int] = 8

    def __post_init__(self) -> None:
        self.checked = True

    @classmethod
    def of_size(cls, size: int) -> "Arguments":
        return cls("model", size)


@dataclass
class Declared:
    """`Arguments` as they would be with the field in their source."""

    path: str
    size: int = 1
    hosts: list[str] = field(default_factory=list)
    gather: bool = False


def described(cls: type[Any]) -> list[tuple[object, ...]]:
    return [(each.name, each.type, each.default, each.default_factory) for each in dataclasses.fields(cls)]


@pytest.fixture
def with_field() -> Iterator[type[Any]]:
    take_back = add_field(Arguments, "gather", bool, default=False)
    yield Arguments
    take_back()


class TestAddedField:
    def test_the_class_stays_the_same_object(self) -> None:
        before = Arguments
        methods = {name: Arguments.__dict__[name] for name in ("__post_init__", "of_size", "limit")}
        take_back = add_field(Arguments, "gather", bool, default=False)
        try:
            assert Arguments is before
            assert {name: Arguments.__dict__[name] for name in methods} == methods
            assert Arguments.of_size(3).size == 3
        finally:
            take_back()

    def test_it_is_a_keyword_of_the_constructor_with_its_default(self, with_field: type[Any]) -> None:
        assert with_field("model").gather is False
        assert with_field("model", gather=True).gather is True
        assert with_field("model", gather=True).checked

    def test_it_comes_last_so_that_positional_callers_see_no_change(self, with_field: type[Any]) -> None:
        assert list(inspect.signature(with_field).parameters) == ["path", "size", "hosts", "gather"]
        assert with_field("model", 2, ["a"]) == with_field(path="model", size=2, hosts=["a"], gather=False)

    def test_factories_still_make_one_value_per_instance(self, with_field: type[Any]) -> None:
        one, other = with_field("model"), with_field("model")
        one.hosts.append("a")
        assert other.hosts == []

    def test_it_is_in_the_repr(self, with_field: type[Any]) -> None:
        assert repr(with_field("m", gather=True)) == "Arguments(path='m', size=1, hosts=[], gather=True)"

    def test_it_counts_for_equality(self, with_field: type[Any]) -> None:
        assert with_field("m", gather=True) == with_field("m", gather=True)
        assert with_field("m", gather=True) != with_field("m")

    def test_the_class_reads_as_one_declared_with_it(self, with_field: type[Any]) -> None:
        assert described(with_field) == described(Declared)
        assert with_field.__match_args__ == ("path", "size", "hosts", "gather")
        assert dataclasses.asdict(with_field("m")) == dataclasses.asdict(Declared("m"))
        assert with_field.__hash__ is None  # as for every dataclass that compares by value

    def test_replace_and_copy_carry_it(self, with_field: type[Any]) -> None:
        original = with_field("m", gather=True)
        assert dataclasses.replace(original, size=5).gather is True
        assert copy.deepcopy(original) == original

    def test_an_instance_survives_pickling(self, with_field: type[Any]) -> None:
        original = with_field("m", gather=True)
        assert pickle.loads(pickle.dumps(original)) == original

    def test_an_instance_pickled_before_has_the_default(self) -> None:
        before = Arguments("m")
        pickled = pickle.dumps(before)
        take_back = add_field(Arguments, "gather", bool, default=False)
        try:
            for old in (before, pickle.loads(pickled)):
                assert old.gather is False  # type: ignore[attr-defined]
                assert old == Arguments("m")
                assert repr(old).endswith("gather=False)")
        finally:
            take_back()

    def test_two_fields_can_be_added(self, with_field: type[Any]) -> None:
        take_back = add_field(with_field, "level", int, default=3)
        try:
            assert with_field("m", gather=True, level=4).level == 4
            assert [each.name for each in dataclasses.fields(with_field)][-2:] == ["gather", "level"]
        finally:
            take_back()
        assert with_field("m", gather=True).gather is True

    def test_a_required_field_keeps_its_options(self) -> None:
        @dataclass
        class WithOptions:
            secret: str = field(repr=False, compare=False, metadata={"help": "a secret"})

        add_field(WithOptions, "gather", bool, default=False)
        assert repr(WithOptions("s")).endswith("WithOptions(gather=False)")
        assert WithOptions("s") == WithOptions("t")
        assert dict(dataclasses.fields(WithOptions)[0].metadata) == {"help": "a secret"}

    def test_an_init_variable_still_reaches_post_init(self) -> None:
        @dataclass
        class WithInitVar:
            scale: InitVar[int] = 2
            size: int = 1

            def __post_init__(self, scale: int) -> None:
                self.size *= scale

        add_field(WithInitVar, "gather", bool, default=False)
        assert WithInitVar(size=5).size == 10
        assert WithInitVar(3, 5, True).size == 15

    def test_inherited_fields_stay_inherited(self) -> None:
        @dataclass
        class Base:
            size: int = 1
            hosts: list[str] = field(default_factory=list)

        @dataclass
        class Derived(Base):
            level: int = 2

        take_back = add_field(Derived, "gather", bool, default=False)
        assert repr(Derived()).endswith("Derived(size=1, hosts=[], level=2, gather=False)")
        assert Base() == Base(1, [])
        take_back()
        assert repr(Derived()).endswith("Derived(size=1, hosts=[], level=2)")

    def test_methods_that_the_class_wrote_itself_are_kept(self) -> None:
        @dataclass
        class WithRepr:
            size: int = 1

            def __repr__(self) -> str:
                return "mine"

            def __eq__(self, other: object) -> bool:
                return isinstance(other, WithRepr)

        add_field(WithRepr, "gather", bool, default=False)
        assert repr(WithRepr(gather=True)) == "mine"  # type: ignore[call-arg]
        assert WithRepr(1) == WithRepr(2)


class TestRemovedField:
    def test_it_is_gone_from_everything(self) -> None:
        before = dict(vars(Arguments))
        signature = inspect.signature(Arguments)
        fields = described(Arguments)

        take_back = add_field(Arguments, "gather", bool, default=False)
        take_back()

        assert inspect.signature(Arguments) == signature
        assert described(Arguments) == fields
        assert not hasattr(Arguments, "gather")
        assert "gather" not in Arguments.__annotations__
        assert Arguments.__match_args__ == ("path", "size", "hosts")  # type: ignore[attr-defined]
        assert repr(Arguments("m")) == "Arguments(path='m', size=1, hosts=[])"
        assert Arguments("m") == Arguments("m")
        assert vars(Arguments).keys() == before.keys()
        assert [name for name in before if vars(Arguments)[name] is not before[name]] == []
        with pytest.raises(TypeError, match="gather"):
            Arguments("m", gather=True)  # type: ignore[call-arg]

    def test_it_can_be_added_again(self) -> None:
        for _ in range(2):
            take_back = add_field(Arguments, "gather", bool, default=True)
            assert Arguments("m").gather is True  # type: ignore[attr-defined]
            take_back()


@dataclass(frozen=True)
class Frozen:
    size: int = 1


@dataclass(order=True)
class Ordered:
    size: int = 1


@dataclass(slots=True)
class Slotted:
    size: int = 1


@dataclass(eq=False)
class ComparedByIdentity:
    size: int = 1


@dataclass(repr=False)
class Unprintable:
    size: int = 1


@dataclass(unsafe_hash=True)
class Hashable:
    size: int = 1


@dataclass(init=False)
class WithoutInit:
    size: int = 1


@dataclass
class WithItsOwnInit:
    size: int = 1

    def __init__(self, text: str) -> None:
        self.size = len(text)


class Plain:
    size: int = 1


class PlainBelowADataclass(Arguments):
    pass


@dataclass
class HasIt:
    gather: bool = True


REFUSED = (
    Frozen,
    Ordered,
    Slotted,
    ComparedByIdentity,
    Unprintable,
    Hashable,
    WithoutInit,
    WithItsOwnInit,
    Plain,
    PlainBelowADataclass,
    HasIt,
)


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_class_that_cannot_be_extended_is_refused_by_name_and_left_as_it_was(cls: type[Any]) -> None:
    before = dict(vars(cls))
    annotations = dict(vars(cls).get("__annotations__", {}))
    with pytest.raises(StandsAsideError) as caught:
        add_field(cls, "gather", bool, default=False)
    assert caught.value.target.startswith(f"{__name__}.{cls.__name__}")
    assert dict(vars(cls)) == before
    assert vars(cls).get("__annotations__", {}) == annotations


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Frozen, "a dataclass with frozen=True, expected False"),
        (Ordered, "a dataclass with order=True, expected False"),
        (ComparedByIdentity, "a dataclass with eq=False, expected True"),
        (Slotted, "a dataclass with slots, which cannot grow"),
        (Plain, "not a dataclass"),
        (PlainBelowADataclass, "not a dataclass"),
        (HasIt, "already there"),
    ],
)
def test_a_refusal_says_what_is_different(cls: type[Any], reason: str) -> None:
    with pytest.raises(StandsAsideError) as caught:
        add_field(cls, "gather", bool, default=False)
    assert caught.value.reason == reason


def test_a_field_that_is_there_is_named() -> None:
    with pytest.raises(StandsAsideError) as caught:
        add_field(HasIt, "gather", bool, default=False)
    assert caught.value.target == f"{__name__}.HasIt.gather"


def test_a_factory_in_a_class_body_is_not_called_by_adding_a_field() -> None:
    calls: list[int] = []

    def factory() -> Callable[[], None]:
        calls.append(1)
        return lambda: None

    made = dataclasses.make_dataclass("made", [("callback", Callable, field(default_factory=factory))])
    made.__module__ = __name__
    add_field(made, "gather", bool, default=False)
    assert calls == []
    made()
    assert calls == [1]
