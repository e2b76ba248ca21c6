"""The two layouts of a series: paths below SGLang's package, or below SGLang's repository, with tests of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How git takes the patches of a series.

    Args:
        apply: options of ``git apply`` in the package's own directory, whatever its name.
        am_in_wheel: options of ``git am`` in a repository that holds ``sglang``.
        am_in_repository: options of ``git am`` in SGLang's repository, which holds ``python/sglang``.
    """

    apply: tuple[str, ...]
    am_in_wheel: tuple[str, ...]
    am_in_repository: tuple[str, ...]


_PACKAGE = Layout(apply=("-p2",), am_in_wheel=(), am_in_repository=("--directory=python",))
# No installed SGLang has the tests of its repository, so they are left out there.
_REPOSITORY = Layout(apply=("-p3", "--include=srt/*"), am_in_wheel=("-p2", "--include=sglang/*"), am_in_repository=())


def layout_of(patches: bytes) -> Layout:
    """The layout of these patches. All of a series have the same."""
    return _REPOSITORY if b"\ndiff --git a/python/sglang/" in patches else _PACKAGE
