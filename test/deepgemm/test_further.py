"""What DeepGEMM compiles for calls that are no target is found in its cache, and is in plans from then on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import msgspec
import pytest
from kit.nogpu import call_einsum
from kit.toolchain import toolchain
from sglang_warmstart.cli import app
from sglang_warmstart.deepgemm import further
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.dialects import dialect_of
from sglang_warmstart.deepgemm.identity import distribution_of, headers_hash, identity_of
from sglang_warmstart.deepgemm.marker import FurtherKernel, Markers
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.plan import Planner
from sglang_warmstart.libraries import deep_gemm_front
from typer.testing import CliRunner

SERVICE = Path("/a/service.sock")
# Of each of the JITs.
VERSIONS = ("0.1.7", "0.2.3.post2")


def watched(place: Path) -> Path:
    """The command that a watched rank has in nvcc's place."""
    words = [sys.executable, "-IS", deep_gemm_front.__file__, str(place / "nobody"), str(place / "ready"), "0"]
    return _script(place / "watched", f'exec {shlex.join([*words, str(toolchain().nvcc)])} "$@"')


def refusing(place: Path) -> Path:
    """A command that knows its version, and compiles nothing."""
    return _script(place / "refusing", f'[ "$1" = --version ] && exec {toolchain().nvcc} --version\nexit 1')


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def compiler() -> Compiler:
    return Compiler(str(toolchain().nvcc), toolchain().compiler().version)


@pytest.mark.parametrize("version", [pytest.param("0.1.7", marks=pytest.mark.long), "0.2.3.post2"])
def test_what_a_rank_compiles_itself_is_compiled_from_the_plan_the_next_time(version: str, tmp_path: Path) -> None:
    package, first, second = toolchain().deep_gemm_of(version), tmp_path / "first", tmp_path / "second"
    call_einsum(str(first), version, watched(tmp_path), SGLANG_WARMSTART_SERVICE=str(SERVICE))
    cache = KernelCache(first, dialect_of(package))
    (kernel,) = further.compiled_in(cache, further.names_in(cache), SERVICE)
    assert "sm90_fp8_gemm" in kernel.directory
    assert further.compiled_in(cache, further.names_in(cache), Path("/another/service.sock")) == []

    # What a marker keeps of it is enough for a plan, and `compile` makes a cache of that which lacks nothing.
    identity = identity_of(gpu_of("h200"), compiler(), package, {})
    markers, launch = Markers(cache, identity), {"rank": "0"}
    markers.add(launch, (), [FurtherKernel(kernel.directory, kernel.flags)])
    exported = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", "export", "--cache", str(first), "-o", str(exported)])
    assert result.exit_code == 0, result.output
    plan = plans.decode(exported.read_bytes())
    assert plan.launches[0].further == tuple(plan.kernels) and len(plan.kernels) == 1
    where = ["--nvcc", str(toolchain().nvcc), "--deep-gemm", str(package)]
    result = CliRunner().invoke(app, ["compile", str(exported), "-o", str(second), *where])
    assert result.exit_code == 0, result.output
    call_einsum(str(second), version, refusing(tmp_path))
    (marker,) = Markers(KernelCache(second, dialect_of(package)), identity).all()
    assert [each.directory for each in marker.further] == [kernel.directory]


def test_without_a_plan_the_same_call_compiles(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        call_einsum(str(tmp_path / "cache"), VERSIONS[-1], refusing(tmp_path))


def test_an_entry_without_the_name_of_a_kernel_is_not_taken(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    for name in ("kernel.a." + "0" * 32, "kernel.\n." + "0" * 32, "evil"):
        cache.path(name).mkdir(parents=True)
        (cache.path(name) / "kernel.cu").write_text("// source")
        (cache.path(name) / further.FLAGS).write_text(f"-O3\n{SERVICE}\n")
    found = further.compiled_in(cache, further.names_in(cache), SERVICE)
    assert [each.directory for each in found] == ["kernel.a." + "0" * 32]


def test_a_cache_that_cannot_be_read_has_no_entries() -> None:
    assert further.names_in(KernelCache(Path("/", "x" * 5000))) == set()


def test_a_rank_without_a_service_leaves_nothing_beside_its_kernels(tmp_path: Path) -> None:
    output = tmp_path / "kernel.cubin"
    for service, left in ((None, False), (str(SERVICE), True)):
        deep_gemm_front.leave_flags(["nvcc", "kernel.cu", "-cubin", "-o", str(output), "-O3", "-std=c++20"], service)
        assert Path(f"{output}.flags").exists() is left
    assert Path(f"{output}.flags").read_text() == f"-O3 -std=c++20\n{SERVICE}\n"


def test_a_plan_that_lacks_a_further_kernel_is_refused() -> None:
    package = toolchain().deep_gemm_of(VERSIONS[0])
    identity = identity_of(gpu_of("h200"), compiler(), package, {})
    planner = Planner(identity, distribution_of(package), headers_hash(package))
    planner.add(identity, {"rank": "0"}, [])
    plan = planner.plan()
    launch = msgspec.structs.replace(plan.launches[0], further=("kernel.gone",))
    with pytest.raises(plans.PlanError, match=r"kernel\.gone, is not in the plan"):
        plans.decode(plans.encode(msgspec.structs.replace(plan, launches=(launch,))))
