"""The machine code in a cubin."""

from __future__ import annotations

import struct

_SECTION = "<IIQQQQIIQQ"  # Elf64_Shdr, by the System V ABI


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """That of each kernel, by the name of its section."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from(_SECTION, cubin, table + number * size) for number in range(count)]
    names = sections[of_names][4]
    found = {}
    for name, _, _, _, offset, length, *_ in sections:
        text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            found[text] = cubin[offset : offset + length]
    return found
