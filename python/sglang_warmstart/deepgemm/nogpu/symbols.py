"""Read the symbols of a shared library, to see before it is loaded whether every stand-in that it needs is there.

Source: the ELF-64 format, by the System V ABI.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

_DYNSYM = 11
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")

# What comes with CUDA and with torch's CUDA libraries, and not with torch, Python or the C++ runtime.
_CUDA_SYMBOL = re.compile(
    r"(cu[A-Z]|cuda[A-Z]|cublas|nvrtc|_ZNK?3c104cuda|_ZNK?2at4cuda|aoti_torch_get_current_(cuda_stream|device_index)$)"
)


class SymbolsError(Exception):
    """A file that is no shared library, or a damaged one; in one line."""


def undefined(path: Path) -> set[str]:
    """The symbols of CUDA that a shared library asks for.

    Raises:
        SymbolsError: it is none.
    """
    return {name for name, section in _symbols(path) if section == 0 and _CUDA_SYMBOL.match(name)}


def defined(path: Path) -> set[str]:
    """The symbols that a shared library offers.

    Raises:
        SymbolsError: it is none.
    """
    return {name for name, section in _symbols(path) if section != 0}


def _symbols(path: Path) -> Iterator[tuple[str, int]]:
    """Name and section (0 for one that is asked for) of each dynamic symbol."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SymbolsError(f"{path}: {error.strerror}") from error
    if data[:5] != b"\x7fELF\x02":
        raise SymbolsError(f"{path} is no shared library")
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        sections = [_SECTION.unpack_from(data, table + number * size) for number in range(count)]
        symbols = next(section for section in sections if section[1] == _DYNSYM)
        texts = sections[symbols[6]]
        names = data[texts[4] : texts[4] + texts[5]]
        for at in range(symbols[4], symbols[4] + symbols[5], _SYMBOL.size):
            name, _, _, section, _, _ = _SYMBOL.unpack_from(data, at)
            yield names[name : names.index(b"\0", name)].decode(), section
    except (struct.error, StopIteration, IndexError, ValueError, OverflowError) as error:
        raise SymbolsError(f"{path} is damaged: its symbols cannot be read") from error
