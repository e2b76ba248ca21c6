"""A cache becomes a plan and a bundle: what finished warm-ups have left in it, and no more."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from kit.bundles import bundle_of, cubin
from kit.installed import install
from kit.plans import LAUNCH, identity_in, real_plan
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.bundle import archive, packing
from sglang_warmstart.bundle.restore import Place, restore
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.marker import Launch, Markers, targets_kernels
from sglang_warmstart.deepgemm.plan import PlanError
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel

SHAPES = (("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048), ("TF32_HC_PRENORM_GEMM", 24, 28672))


class Warmed:
    """A cache in which a server has warmed its targets.

    Args:
        directory: of its own.
    """

    def __init__(self, directory: Path) -> None:
        self.deep_gemm = install(directory / "site-packages")
        self.cache = KernelCache(directory / "cache")
        self.warm(LAUNCH, *SHAPES)

    def warm(self, launch: Launch, *shapes: tuple[str, int, int], searched: bool = True, **changed: object) -> None:
        finished = []
        for shape in shapes:
            target, kernels = recording().of_target(*shape, self.deep_gemm / "include")
            for kernel in kernels:
                self.cache.publish(kernel.directory, kernel.source, cubin(kernel.directory.encode()))
            finished.append(targets_kernels(target, kernels))
        Markers(self.cache, identity_in(self.deep_gemm, **changed)).add(launch, finished, searched=searched)

    @property
    def state(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.cache.root.rglob("*") if path.is_file()}


@pytest.fixture
def warmed(tmp_path: Path) -> Warmed:
    return Warmed(tmp_path)


def test_the_plan_of_a_cache_is_the_one_that_would_have_been_recorded(warmed: Warmed) -> None:
    before = warmed.state
    exported = packing.export(warmed.cache.root)
    assert exported.plan == real_plan(SHAPES)
    assert exported.installations == (warmed.deep_gemm,)
    assert exported.notes == ()
    assert warmed.state == before


def test_a_bundle_that_was_restored_elsewhere_exports_the_same_plan(warmed: Warmed, tmp_path: Path) -> None:
    plan = packing.export(warmed.cache.root).plan
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    there = install(tmp_path / "elsewhere")
    with path.open("rb") as stream:
        restore(stream, Place(tmp_path / "other", there, {"CUDA_HOME": str(toolchain().cuda_home)}))
    assert plans.encode(packing.export(tmp_path / "other").plan) == plans.encode(plan)


def test_a_launch_whose_search_has_not_ended_is_searched_once_more_where_it_is_restored(
    warmed: Warmed, tmp_path: Path
) -> None:
    other = {**LAUNCH, "rank": "7"}
    warmed.warm(other, SHAPES[0], searched=False)
    plan = packing.export(warmed.cache.root).plan
    assert [each.searched for each in plan.launches if each.launch == other] == [False]
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    with path.open("rb") as stream:
        restore(stream, Place(tmp_path / "other", warmed.deep_gemm, {"CUDA_HOME": str(toolchain().cuda_home)}))
    restored = packing.export(tmp_path / "other").plan
    assert {each.launch["rank"]: each.searched for each in restored.launches} == {LAUNCH["rank"]: True, "7": False}


def test_a_kernel_that_was_compiled_with_a_hostile_option_is_left_out(warmed: Warmed) -> None:
    for option in ("-ccbin=/tmp/evil", "-I/tmp/evil"):
        target, (kernel, *_) = recording().of_target(*SHAPES[1], warmed.deep_gemm / "include")
        flags = f"{kernel.flags} {option}"
        compiler = identity_in(warmed.deep_gemm).compiler
        name = warmed.cache.dialect.directory_of(kernel.directory, compiler, flags, kernel.source)
        evil = RecordedKernel(name, kernel.source, flags, 1)
        warmed.cache.publish(name, evil.source, cubin(b"evil"))
        finished = [targets_kernels(target, [evil])]
        Markers(warmed.cache, identity_in(warmed.deep_gemm)).add({"evil": option}, finished)
        exported = packing.export(warmed.cache.root)
        assert name not in exported.plan.kernels
        assert f"{name}: '{option}' is no option that DeepGEMM gives to its compiler" in "".join(exported.notes)


def test_all_ranks_of_all_servers_are_in_it(warmed: Warmed) -> None:
    warmed.warm({**LAUNCH, "rank": "1"}, SHAPES[0])
    warmed.warm({**LAUNCH, "tp_size": "8"}, SHAPES[1], gpu="NVIDIA H100 80GB HBM3")
    plan = packing.export(warmed.cache.root).plan
    found = {
        (launch.gpu, launch.launch["rank"], launch.launch["tp_size"]): len(launch.targets) for launch in plan.launches
    }
    assert found == {
        (recording().gpu, "0", "1"): 2,
        (recording().gpu, "1", "1"): 1,
        ("NVIDIA H100 80GB HBM3", "0", "8"): 1,
    }
    assert len(plan.kernels) == 3


def test_a_kernel_that_is_not_what_it_was_leaves_its_target_out(warmed: Warmed) -> None:
    use = Markers(warmed.cache, identity_in(warmed.deep_gemm)).load(LAUNCH).targets[0].kernels[0]  # type: ignore[union-attr]
    path = warmed.cache.path(use.directory) / "kernel.cubin"
    path.write_bytes(path.read_bytes() + b"changed")
    exported = packing.export(warmed.cache.root)
    (note,) = exported.notes
    assert f"is left out: {use.directory} is not what it was" in note
    (left_out,) = exported.plan.left_out
    assert left_out.reason == f"{use.directory} is not what it was"
    assert [len(launch.targets) for launch in exported.plan.launches] == [1]


def test_a_source_that_its_flags_do_not_give_the_name_of_leaves_its_target_out(warmed: Warmed) -> None:
    use = Markers(warmed.cache, identity_in(warmed.deep_gemm)).load(LAUNCH).targets[0].kernels[0]  # type: ignore[union-attr]
    (warmed.cache.path(use.directory) / "kernel.cu").write_text("another source")
    (left_out,) = packing.export(warmed.cache.root).plan.left_out
    assert left_out.reason == f"{use.directory} was compiled with other flags than the marker has"


def test_a_cache_without_a_marker_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no marker of a finished warm-up: start a server with it first"):
        packing.export(tmp_path)


def test_where_deep_gemm_was_replaced_the_plan_is_gone(warmed: Warmed, tmp_path: Path) -> None:
    warmed.deep_gemm.unlink()
    (warmed.deep_gemm / "include").mkdir(parents=True)
    with pytest.raises(PlanError, match=r"is not that of the warm-up in .* any more"):
        packing.export(warmed.cache.root)


def test_of_two_compilers_one_has_to_be_chosen(warmed: Warmed) -> None:
    other = identity_in(warmed.deep_gemm, compiler=toolchain().compiler().version.replace("V13.0.88", "V13.0.48"))
    warmed.warm(LAUNCH, SHAPES[0], compiler=other.compiler)
    with pytest.raises(PlanError, match=r"not of the same compiler: .* Choose one with --identity: ") as caught:
        packing.export(warmed.cache.root)
    assert other.digest in str(caught.value)
    plan = packing.export(warmed.cache.root, other.digest[:8]).plan
    assert plan.compiler == other.compiler
    with pytest.raises(PlanError, match="that begins with nothing-of-that"):
        packing.export(warmed.cache.root, "nothing-of-that")


def test_nvrtcs_kernels_lie_under_a_root_of_their_own(warmed: Warmed) -> None:
    root = warmed.cache.root.with_name("both")
    root.mkdir()
    warmed.cache.root.rename(root / "nvrtc")
    warmed.cache = KernelCache(root / "nvrtc")
    for path in warmed.cache.own.glob("markers/*"):
        path.rename(path.with_name("gone"))
    warmed.warm(LAUNCH, *SHAPES, kind="nvrtc")
    exported = packing.export(root)
    assert exported.plan.kind == "nvrtc"
    assert packing.cubins_in(root, exported).keys() == exported.plan.kernels.keys()


def test_a_bundle_of_a_cache_has_its_cubins(warmed: Warmed, tmp_path: Path) -> None:
    exported = packing.export(warmed.cache.root)
    cubins = packing.cubins_in(warmed.cache.root, exported)
    contents = packing.contents_of(exported.plan, cubins)
    path = tmp_path / "bundle.tar.zst"
    archive.write(path, contents.manifest, contents.open)
    with path.open("rb") as stream:
        manifest = archive.read(stream)
    directories = exported.plan.directories(warmed.deep_gemm / "include")
    expected = {name: hashlib.sha256(cubin(directory.encode())).hexdigest() for name, directory in directories.items()}
    assert manifest.cubins == expected
    assert manifest.plan == exported.plan
