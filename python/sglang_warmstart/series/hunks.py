"""Apply the hunks of a patch to the bytes of one file, exactly and at the place that ``git apply`` would choose."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Git ends a line at a newline and nowhere else. What bytes.splitlines() takes for one is part of a line here.
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Hunk:
    """One change of a few lines. Each line has its newline, but the last one of a file may lack it.

    Args:
        number: place among the hunks of its file, from 1.
        old_start, new_start: number of the first line before and after the change, as in the hunk's head.
        old, new: the lines before and after, with their context.
        trailing: lines of context after the last change.
    """

    number: int
    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    trailing: int

    def reversed(self) -> Hunk:
        """The hunk that takes this one back."""
        return Hunk(self.number, self.new_start, self.old_start, self.new, self.old, self.trailing)


@dataclass(frozen=True)
class Misfit:
    """A hunk that cannot be applied.

    Args:
        hunk: which one.
        line: number of the line in the file, before any hunk changed it, where ``expected`` should be.
        expected: the first line of the hunk that is not there. None if all are, in a place where they do not count.
        reason: what is wrong, in a few words.
    """

    hunk: Hunk
    line: int
    expected: bytes | None
    reason: str


@dataclass
class _Image:
    """The lines of a file while it is changed, and the number each had before. A hunk's own lines have 0.

    ``length`` is that of the file before.
    """

    lines: list[bytes]
    numbers: list[int]
    length: int

    def put(self, hunk: Hunk, place: int) -> None:
        span = slice(place, place + len(hunk.old))
        self.lines[span] = hunk.new
        self.numbers[span] = [0] * len(hunk.new)

    def number_at(self, place: int) -> int:
        """The number of the line at a place; between the lines of other hunks, that of the line before."""
        if place < len(self.numbers) and self.numbers[place]:
            return self.numbers[place]
        return max(self.numbers[:place], default=0) + 1


def apply(content: bytes, hunks: Sequence[Hunk]) -> tuple[bytes, list[Misfit]]:
    """Apply hunks to the content of a file.

    Returns:
        The new content, and the hunks that do not fit. The content has those that fit, also if others do not.
    """
    lines = _LINE.findall(content)
    image = _Image(lines, list(range(1, len(lines) + 1)), len(lines))
    misfits = []
    for hunk in hunks:
        place = _find(image, hunk)
        if place is None:
            misfits.append(_explain(image, hunk))
        else:
            image.put(hunk, place)
    return b"".join(image.lines), misfits


def _find(image: _Image, hunk: Hunk) -> int | None:
    # Lines that an earlier hunk wrote are not there to be matched.
    for place in _places(image, hunk):
        span = slice(place, place + len(hunk.old))
        if tuple(image.lines[span]) == hunk.old and all(image.numbers[span]):
            return place
    return None


def _places(image: _Image, hunk: Hunk) -> Iterator[int]:
    """Where to look for a hunk, the nearest place first and the later one of two as near.

    Source: git 2.39, ``apply.c``, ``apply_one_fragment`` and ``find_pos``. Git gives as many lines of context as there
    are, so a hunk at line 1 begins with the file, and a hunk without context at its end ends with the file.
    """
    last = len(image.lines) - len(hunk.old)
    first = 0
    if hunk.old_start <= 1:
        last = min(last, 0)
    if not hunk.trailing:
        first = len(image.lines) - len(hunk.old)
    yield from _by_distance(_start(image, hunk), first, last)


def _start(image: _Image, hunk: Hunk) -> int:
    # The earlier hunks are in the image, so the line is that of the new file.
    return min(max(hunk.new_start - 1, 0), len(image.lines))


def _by_distance(start: int, first: int, last: int) -> Iterator[int]:
    """The numbers from ``first`` to ``last``, those nearest to ``start`` first."""
    for distance in range(max(start - first, last - start, 0) + 1):
        for place in (start + distance, start - distance) if distance else (start,):
            if max(first, 0) <= place <= last:
                yield place


def _explain(image: _Image, hunk: Hunk) -> Misfit:
    place = _likeliest(image, hunk)
    found = image.lines[place : place + len(hunk.old)]
    for index, expected in enumerate(hunk.old):
        if index >= len(found) or found[index] != expected:
            line = image.number_at(place + index)
            reason = "the file ends before it" if index >= len(found) else "another line is there"
            return Misfit(hunk, line, expected, reason)
    where = "the beginning" if hunk.old_start <= 1 and place else "the end"
    overlaps = not all(image.numbers[place : place + len(hunk.old)])
    reason = (
        "its lines are taken by an earlier hunk" if overlaps else f"its lines are there, but not at {where} of the file"
    )
    return Misfit(hunk, image.number_at(place), None, reason)


def _likeliest(image: _Image, hunk: Hunk) -> int:
    """Where a hunk that does not fit was meant to be: where most of its lines are, else where its head says."""
    start = min(max(hunk.old_start - 1 + len(image.lines) - image.length, 0), len(image.lines))
    telling = [(index, line) for index, line in enumerate(hunk.old) if line.strip()]
    best, most = start, 0
    for place in _by_distance(start, 0, len(image.lines) - 1):
        tail = image.lines[place : place + len(hunk.old)]
        score = sum(1 for index, line in telling if index < len(tail) and tail[index] == line)
        if score > most:
            best, most = place, score
    return best if 2 * most >= len(telling) else start
