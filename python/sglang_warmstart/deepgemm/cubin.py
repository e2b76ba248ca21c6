"""Check that a file is a whole cubin: an ELF file with everything that its header promises."""

from __future__ import annotations

import struct

_HEADER_SIZE = 64


def defect_of(cubin: bytes) -> str | None:
    """What is wrong with the bytes that a compiler left, or None.

    Source: the ELF-64 header, by the System V ABI.
    """
    if not cubin:
        return "empty"
    if cubin[:5] != b"\x7fELF\x02" or len(cubin) < _HEADER_SIZE:
        return "not a 64-bit ELF file"
    # e_phoff and e_shoff, then size and number of the entries of both tables
    program, section = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", cubin, 54)
    needed = max(program + program_size * programs, section + section_size * sections)
    if len(cubin) < needed:
        return f"truncated: {len(cubin)} of at least {needed} bytes"
    return None
