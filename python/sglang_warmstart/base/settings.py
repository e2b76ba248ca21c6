"""Values of environment variables that are no booleans, each with a complaint where it is not understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def number_above_0(name: str, environment: Mapping[str, str]) -> tuple[int | None, str | None]:
    """The value of a variable that takes a number above 0.

    Returns:
        The value, None where there is none that is one; and what is wrong with it, in one line that names the variable.
    """
    word = environment.get(name)
    if word is None:
        return None, None
    if word.isdecimal() and int(word) > 0:
        return int(word), None
    return None, f'{name}: "{word}" is not a number above 0, using the default'


def one_of(name: str, words: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str | None]:
    """The value of a variable that takes one of ``words``; the first of them is the default.

    Returns:
        The value, and what is wrong with the variable, in one line that names it.
    """
    word = environment.get(name, words[0])
    if word in words:
        return word, None
    return words[0], f'{name}: "{word}" is not {" or ".join(words)}, using the default'
