"""A compiler's output is told from half of it, and from a recorder's stub."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from kit.recorded import real_cubin
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.compiler import CompileJob, compile_kernel


def _real_stub() -> bytes:
    return compile_kernel(CompileJob(stub.SOURCE, " ".join(stub.flags_for((9, 0))), toolchain().compiler(), 60))


def test_a_real_kernel_is_whole_and_no_stub() -> None:
    assert cubin.defect_of(real_cubin()) is None
    assert not stub.is_stub(real_cubin())


def test_a_real_stub_is_whole_too_and_bears_its_mark() -> None:
    # Whole, or DeepGEMM would not load it while it is asked which kernels it needs.
    compiled = _real_stub()
    assert cubin.defect_of(compiled) is None
    assert stub.is_stub(compiled)


@given(st.data())
def test_no_beginning_of_a_real_kernel_is_whole(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(real_cubin()) - 1))
    assert cubin.defect_of(real_cubin()[:length]) is not None


def test_a_defect_is_said_in_words() -> None:
    whole = real_cubin()
    assert cubin.defect_of(b"") == "empty"
    assert cubin.defect_of(b"#!/bin/sh\n" * 100) == "not a 64-bit ELF file"
    assert cubin.defect_of(whole[:63]) == "not a 64-bit ELF file"
    assert cubin.defect_of(whole[:-1]) == f"truncated: {len(whole) - 1} of at least {len(whole)} bytes"


@given(st.binary(max_size=300))
def test_any_bytes_are_judged(data: bytes) -> None:
    assert cubin.defect_of(data) is not None or data[:4] == b"\x7fELF"


@given(
    tables=st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)),
    entries=st.tuples(*[st.integers(0, 100)] * 4),
    length=st.integers(64, 30_000),
)
def test_whole_is_what_holds_both_tables_of_the_header(
    tables: tuple[int, int], entries: tuple[int, int, int, int], length: int
) -> None:
    # ELF-64 by the System V ABI: 16 bytes of identification, then the fields in this order.
    program_size, programs, section_size, sections = entries
    header = b"\x7fELF\x02" + bytes(11) + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, *tables, 0, 64, *entries, 0)
    ends = (tables[0] + program_size * programs, tables[1] + section_size * sections)
    assert (cubin.defect_of(header.ljust(length, b"\0")) is None) == (max(ends) <= length)
