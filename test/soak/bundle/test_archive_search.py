"""Archives that a stranger may have made are whole or refused. A short case: test/bundle/test_archive.py."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.bundles import compressed, member, small_bundle, tar_of
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.manifest import BundleError

SMALL = small_bundle()
NAMES = [f"files/{name}" for name in sorted(SMALL.contents)]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes an empty directory, as often as a property test asks for one."""
    root, numbers = tmp_path_factory.mktemp("fresh"), itertools.count()

    def make() -> Path:
        path = root / str(next(numbers))
        path.mkdir()
        return path

    return make


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*")}


_TYPES = st.sampled_from([bytes([kind]) for kind in b"01234567SLKxgVDMZ\0"])
_MEMBER_NAMES = st.sampled_from(
    [
        "manifest.json",
        "manifest.sig",
        *NAMES,
        f"/{NAMES[0]}",
        f"../{NAMES[0]}",
        "/etc/passwd",
        "files",
        "files/",
        "",
        "a" * 150,
    ]
) | st.text(max_size=120)
_SIZES = st.integers(-(1 << 40), 1 << 70) | st.integers(0, 2000)


@st.composite
def _hostile(draw: st.DrawFn) -> bytes:
    """The small bundle's members, some of them others, in any of tarfile's formats."""
    members = SMALL.members(draw(st.none() | st.binary(min_size=64, max_size=64)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(members) - 1)) if members else 0
        info, data = members[at] if members else member("x", b"")
        data = draw(st.just(data) | st.binary(max_size=600))
        fields = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": _MEMBER_NAMES,
                    "type": _TYPES,
                    "size": _SIZES,
                    "linkname": _MEMBER_NAMES,
                    "mtime": _SIZES,
                },
            )
        )
        new = member(str(fields.pop("name", info.name)), data, **fields)
        where = draw(st.sampled_from([slice(at, at), slice(at, at + 1)]))
        members[where] = draw(st.sampled_from([[], [new], [new], [new, new]]))
    tar = tar_of(members, tar_format=draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    return compressed(tar)


def _whole_or_refused(fresh: Callable[[], Path], data: bytes) -> None:
    """Either it is refused and nothing written, or all that is written is what its manifest says."""
    into = fresh()
    stream = io.BytesIO(data)
    try:
        manifest = archive.read(stream)
    except BundleError as error:
        assert str(error).isprintable()
        with pytest.raises(BundleError):
            archive.extract(stream, SMALL.manifest, into)
        assert _content(into).items() <= SMALL.contents.items()
    else:
        archive.extract(stream, manifest, into)
        found = _content(into)
        assert {name: len(content) for name, content in found.items()} == manifest.files
        assert all(hashlib.sha256(content).hexdigest() == name for name, content in found.items())
    assert {path.name for path in into.iterdir()} <= SMALL.contents.keys()


@settings(max_examples=3000)
@given(_hostile())
def test_a_hostile_tar_file_is_whole_or_refused(fresh: Callable[[], Path], data: bytes) -> None:
    _whole_or_refused(fresh, data)


@settings(max_examples=3000)
@given(st.data())
def test_with_other_bits_it_is_the_same_or_refused(fresh: Callable[[], Path], data: st.DataObject) -> None:
    whole = bytearray(SMALL.archive())
    for bit in data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3)):
        whole[bit // 8] ^= 1 << bit % 8
    _whole_or_refused(fresh, bytes(whole))


@settings(max_examples=3000)
@given(st.data())
def test_a_tar_file_with_other_bits_is_the_same_or_refused(fresh: Callable[[], Path], data: st.DataObject) -> None:
    tar = bytearray(tar_of(SMALL.members()))
    for bit in data.draw(st.lists(st.integers(0, 8 * len(tar) - 1), min_size=1, max_size=3)):
        tar[bit // 8] ^= 1 << bit % 8
    _whole_or_refused(fresh, compressed(bytes(tar)))
