"""A manifest is decoded if it holds together, and whatever else it may be, it ends in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.bundles import Bundle, bundles, small_bundle
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError, Manifest
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.libraries.cached import CachedFile, LibraryCache

SMALL = small_bundle().manifest
SHA256 = next(iter(SMALL.files))


def _refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        manifests.decode(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100
    return str(caught.value)


def _changed(**fields: object) -> bytes:
    return manifests.encode(msgspec.structs.replace(SMALL, **fields))


def _with_paths(*paths: str, mtime_ns: int = 0) -> bytes:
    files = tuple(CachedFile(path, SHA256, mtime_ns) for path in paths)
    return _changed(caches=(*SMALL.caches, LibraryCache("flashinfer", {}, files)))


@given(bundles())
def test_a_manifest_is_read_as_it_was_written(bundle: Bundle) -> None:
    data = manifests.encode(bundle.manifest)
    assert manifests.decode(data) == bundle.manifest
    assert manifests.encode(manifests.decode(data)) == data


def test_a_person_can_read_it() -> None:
    lines = manifests.encode(SMALL).decode().splitlines()
    assert lines[:3] == ["{", ' "format": 1,', ' "made_by": "0.1.0",']


# Refusals


def test_another_format_is_named() -> None:
    assert _refusal(b'{"format": 2}') == "a bundle of format 2, this version reads format 1"
    plan = msgspec.structs.replace(SMALL.plan, format=2)
    assert _refusal(_changed(plan=plan)) == "its plan is of format 2, this version reads format 1"


def test_what_is_no_manifest_is_refused_in_a_line() -> None:
    assert "Expected `object`, got `array`" in _refusal(b"[]")
    assert "Object missing required field `format`" in _refusal(b"{}")
    assert "malformed" in _refusal(b"\0" * 1000)
    assert "utf-8" in _refusal(b'{"format": 1, "made_by": "\xff"}').lower()
    assert "recursion" in _refusal(b'{"x": ' + b"[" * 1_000_000)


def test_a_plan_that_does_not_hold_together_is_refused() -> None:
    kernel, planned = next(iter(SMALL.plan.kernels.items()))
    others = SMALL.plan.kernels | {kernel: msgspec.structs.replace(planned, source="// another")}
    plan = msgspec.structs.replace(SMALL.plan, kernels=others)
    assert f"its manifest: {kernel}: its source or its flags are not those" in _refusal(_changed(plan=plan))


def test_what_a_manifest_names_and_its_files_agree() -> None:
    other = "0" * 64
    assert f"its files do not agree: '{other}'" in _refusal(_changed(files=SMALL.files | {other: 1}))
    without = {name: size for name, size in SMALL.files.items() if name != SHA256}
    assert f"its files do not agree: '{SHA256}'" in _refusal(_changed(files=without))
    assert "its files do not agree: ''" in _refusal(_changed(cubins=SMALL.cubins | {next(iter(SMALL.failed)): ""}))


@pytest.mark.parametrize("name", ["", "../" + "0" * 61, "/" + "0" * 63, "0" * 63, "0" * 65, "F" * 64, "0" * 64 + "\n"])
def test_a_file_is_named_by_a_checksum_and_nothing_else(name: str) -> None:
    cubins = dict.fromkeys(SMALL.cubins, name)
    assert f"not a file: {name!r} of 1 bytes" in _refusal(_changed(cubins=cubins, files=SMALL.files | {name: 1}))


def test_no_file_has_less_than_nothing_in_it() -> None:
    assert "of -1 bytes" in _refusal(_changed(files=SMALL.files | {SHA256: -1}))


def test_kernels_are_those_of_the_plan() -> None:
    assert "'kernel.x' is not in its plan" in _refusal(_changed(cubins=SMALL.cubins | {"kernel.x": SHA256}))
    assert "'kernel.x' is not in its plan" in _refusal(_changed(failed={"kernel.x": "a reason"}))


@pytest.mark.parametrize("name", ["../words-0123456789abcdef.json", "words-0123456789abcdef", "words-.json", ""])
def test_a_plan_of_builds_has_the_name_of_one(name: str) -> None:
    assert "is no name of a plan of builds" in _refusal(_changed(builds={name: SHA256}))


def test_a_library_has_one_cache() -> None:
    assert "a library's cache is in it twice" in _refusal(_changed(caches=2 * SMALL.caches))


@pytest.mark.parametrize(
    ("path", "defect"),
    [
        ("", "empty, or too long"),
        ("a/" * 512 + "a", "empty, or too long"),
        ("/etc/passwd", "an absolute path"),
        ("..", "not a plain relative path"),
        ("a/../../b", "not a plain relative path"),
        ("a/./b", "not a plain relative path"),
        ("a//b", "not a plain relative path"),
        ("a/", "not a plain relative path"),
        ("a\0b", "not printable"),
        ("a\nb", "not printable"),
        ("\u202ea", "not printable"),
        ("ä" * 128, "a name too long"),
    ],
)
def test_a_path_that_is_not_plain_is_refused(path: str, defect: str) -> None:
    assert _refusal(_with_paths(path)).endswith(f": {defect}")


def test_paths_do_not_get_in_each_others_way() -> None:
    assert "'a/b' is in it twice" in _refusal(_with_paths("a/b", "c", "a/b"))
    assert "'a/b' is a file and a directory" in _refusal(_with_paths("a/b/c/d", "a/b", "a/b-c"))
    manifests.decode(_with_paths("a/b/c", "a/b-c", "a/b0", "a/bc/b"))


@pytest.mark.parametrize("mtime_ns", [-1, 1 << 63])
def test_a_time_is_one_that_a_file_can_have(mtime_ns: int) -> None:
    assert f"changed at {mtime_ns} ns" in _refusal(_with_paths("a", mtime_ns=mtime_ns))


@given(st.text())
def test_a_message_that_quotes_a_bundle_is_one_printable_line(text: str) -> None:
    _refusal(_changed(caches=(LibraryCache(text, {}, (CachedFile("..", SHA256, 0),)),)))
    _refusal(_changed(failed={text: ""}))
    assert str(BundleError(text)).isprintable()


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    said = str(BundleError("what " + "x" * 10_000_000 + ": what to do"))
    assert said.startswith("what x")
    assert said.endswith("x: what to do")


# Whatever it may be


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A valid manifest in which some values are others."""
    holder: dict[str, Any] = {"": json.loads(manifests.encode(draw(bundles()).manifest))}
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
    for _ in range(draw(st.integers(1, 3))):
        inside: Any = holder
        key: Any = ""
        while isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 9)):
            inside = inside[key]
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        old = inside[key]
        inside[key] = draw(anything | st.just(old + 1 if isinstance(old, int) else old))
    return json.dumps(holder[""]).encode()


@given(_mutated() | st.binary() | st.text().map(str.encode))
@example(b"")
def test_any_bytes_are_a_manifest_that_holds_together_or_refused(data: bytes) -> None:
    try:
        found = manifests.decode(data)
    except BundleError as error:
        assert str(error).isprintable()
    else:
        _holds_together(found)


@given(st.data())
def test_a_manifest_with_other_bytes_in_it_holds_together_or_is_refused(data: st.DataObject) -> None:
    whole = bytearray(manifests.encode(SMALL))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = manifests.decode(bytes(whole))
    except BundleError as error:
        assert str(error).isprintable()
    else:
        _holds_together(found)


def _holds_together(found: Manifest) -> None:
    plans.check(found.plan)
    named = {*found.cubins.values(), *(file.sha256 for cache in found.caches for file in cache.files)}
    assert named == found.files.keys()
    assert found.cubins.keys() | found.failed.keys() <= found.plan.kernels.keys()
    assert all(size >= 0 for size in found.files.values())
    assert manifests.decode(manifests.encode(found)) == found


# Names that are plain although they do not look it, and others.
_PLAIN = st.sampled_from(["...", "..a", "~", "a\\..", "C:", "-", "\u2215", "%2e%2e", "$HOME", "*", "ä"])
_NAMES = _PLAIN | _PLAIN | st.text(min_size=1, max_size=4) | st.sampled_from(["", ".", "..", " ", "a\0", "a/.."])


@given(st.lists(st.lists(_NAMES, min_size=1, max_size=3).map("/".join), max_size=3))
def test_a_path_that_is_accepted_stays_below_the_root_it_is_joined_to(paths: list[str]) -> None:
    try:
        files = manifests.decode(_with_paths(*paths)).caches[-1].files
    except BundleError:
        return
    root = Path("/somewhere/below").resolve()
    resolved = [(root / file.path).resolve() for file in files]
    assert [str(path) for path in resolved] == [f"{root}/{path}" for path in paths]
    assert len(set(resolved)) == len(paths)
    assert not {above for path in resolved for above in path.parents} & set(resolved)


# What costs much


def test_kernels_that_would_take_long_to_name_are_refused_at_once() -> None:
    """Each of many kernels has the same long line of flags, and its name is a hash of that, computed in Python."""
    flags = "-" * 100_000
    kernels = {f"kernel.k.{number:032x}": plans.PlannedKernel(0, str(number)) for number in range(5000)}
    plan = msgspec.structs.replace(SMALL.plan, flags=(flags,), kernels=kernels, launches=())
    data = _changed(plan=plan, cubins={}, failed={}, caches=(), files={})
    start = time.monotonic()
    assert "its kernels have 500018890 characters of sources and flags" in _refusal(data)
    assert time.monotonic() - start < 5


def test_many_deep_paths_do_not_take_long() -> None:
    data = _with_paths(*(f"{'a/' * 490}{number}" for number in range(20_000)))
    start = time.monotonic()
    manifests.decode(data)
    assert time.monotonic() - start < 10
