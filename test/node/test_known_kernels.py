"""A plan has the kernels of its targets; they hold for the DeepGEMM, compiler and GPU that they were made by."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from kit.bundles import identity
from kit.node import GPU
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.libraries import machine
from sglang_warmstart.node.known_kernels import Known, kernels_here, known_of
from sglang_warmstart.node.protocol import Hello


@pytest.fixture
def hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hello:
    monkeypatch.syspath_prepend(str(toolchain().include.parents[1]))
    environment = {"CUDA_HOME": str(toolchain().cuda_home)}
    return Hello(str(tmp_path), environment, str(machine.package("deep_gemm")), GPU, {})


def recorded() -> list[RecordedKernel]:
    """Real ones of DeepGEMM 0.1.0."""
    return [recording().relocated(name, toolchain().include) for name in list(recording().kernels)[:5]]


def test_kernels_come_back_as_they_were_and_are_written_without_a_place(hello: Hello) -> None:
    known = known_of(recorded(), hello, identity())
    assert known is not None
    assert kernels_here(known, hello, identity()) == recorded()
    place = str(machine.package("deep_gemm"))
    assert any(place in each.flags for each in recorded())
    assert place not in msgspec.json.encode(known).decode()


@pytest.mark.parametrize("changed", [{"compiler": "another"}, {"deep_gemm": "another"}, {"gpu": "NVIDIA H20"}])
def test_with_anything_else_they_do_not_hold(changed: dict[str, str], hello: Hello) -> None:
    known = known_of(recorded(), hello, identity())
    assert kernels_here(known, hello, msgspec.structs.replace(identity(), **changed)) == []


def test_what_is_no_kernel_is_left_aside(hello: Hello) -> None:
    good, *others = recorded()
    names = ("../../elsewhere", "no kernel")
    bad = [msgspec.structs.replace(each, directory=name) for each, name in zip(others, names, strict=False)]
    bad.append(msgspec.structs.replace(good, flags="-I@{package.nowhere}"))
    known = Known(identity().digest, (*bad, good))
    found = kernels_here(known, hello, identity())
    assert [each.source for each in found] == [good.source]
    assert kernels_here(None, hello, identity()) == []
