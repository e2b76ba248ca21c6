"""A marker is used if it is about this very start and its kernels are as they were; else the work is done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from kit.compiling import Order, compile_all
from kit.recorded import real_cubin, recording
from kit.scripted_compiler import write_copying_compiler
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.marker import FORMAT, MarkerError, Markers, TargetKernels, targets_kernels
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import KernelUse

IDENTITY = Identity(
    gpu="NVIDIA H200",
    num_sms=132,
    capability=(9, 0),
    deep_gemm="0123",
    installed_in=recording().installed_in,
    compiler=recording().compiler,
    kind="nvcc",
    settings={"DG_JIT_USE_NVRTC": "0"},
)
LAUNCH = {"model": "deepseek", "rank": "0"}


class Warmed:
    """A cache in which a target has been warmed, and the marker that was left."""

    def __init__(self, root: Path) -> None:
        self.cache = KernelCache(root)
        self.markers = Markers(self.cache, IDENTITY)
        include = toolchain().include
        target, self.kernels = recording().of_target("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048, include)
        self.target = targets_kernels(target, self.kernels)
        for kernel in self.kernels:
            self.publish(kernel)
        self.markers.add(LAUNCH, [self.target])

    def publish(self, kernel: RecordedKernel) -> None:
        self.cache.publish(kernel.directory, kernel.source, real_cubin())

    def another_target(self) -> TargetKernels:
        """One that shares no kernel with the first, warmed as well."""
        target, kernels = recording().of_target("TF32_HC_PRENORM_GEMM", 24, 28672, toolchain().include)
        for kernel in kernels:
            self.publish(kernel)
        return targets_kernels(target, kernels)

    @property
    def cubin(self) -> Path:
        """That of its first kernel."""
        return self.cache.path(self.kernels[0].directory) / "kernel.cubin"

    @property
    def path(self) -> Path:
        return self.markers.path(LAUNCH)

    def refusal(self) -> str:
        """Why the marker is not used. It is not looked at a second time."""
        with pytest.raises(MarkerError) as caught:
            self.markers.load(LAUNCH)
        assert "\n" not in str(caught.value)
        (aside,) = self.path.parent.glob("*.set-aside")
        assert str(caught.value).endswith(f"; it is set aside as {aside.name}")
        assert self.markers.load(LAUNCH) is None
        return str(caught.value)


@pytest.fixture
def warmed(tmp_path: Path) -> Warmed:
    """A cache after a warm-up."""
    return Warmed(tmp_path / "root")


def test_a_restart_finds_targets_and_kernels(warmed: Warmed) -> None:
    marker = warmed.markers.load(LAUNCH)
    assert marker is not None
    assert marker.targets == (warmed.target,)
    assert {file.directory for file in marker.files} == {kernel.directory for kernel in warmed.kernels}
    assert warmed.markers.find(warmed.target.target) == warmed.target


def test_a_cache_without_a_marker_has_none(tmp_path: Path, warmed: Warmed) -> None:
    markers = Markers(KernelCache(tmp_path / "another"), IDENTITY)
    assert markers.load(LAUNCH) is None
    assert markers.find(warmed.target.target) is None


# Somebody else's


CHANGES: list[dict[str, object]] = [
    {"gpu": "NVIDIA H100 80GB HBM3"},
    {"num_sms": 78},
    {"capability": (10, 0)},
    {"deep_gemm": "4567"},
    {"installed_in": "/elsewhere/deep_gemm"},
    {"compiler": recording().compiler.replace("13.0", "12.9")},
    {"kind": "nvrtc"},
    {"settings": {}},
    {"settings": {"DG_JIT_USE_NVRTC": "0", "DG_JIT_PTXAS_VERBOSE": "1"}},
    {"jit": "deepjit"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(change))
def test_a_marker_of_another_identity_is_not_used(warmed: Warmed, change: dict[str, object]) -> None:
    others = replace(warmed.markers, identity=msgspec.structs.replace(IDENTITY, **change))
    assert others.load(LAUNCH) is None
    assert others.find(warmed.target.target) is None
    # nor where somebody has copied it to the place of ours
    path = others.path(LAUNCH)
    path.parent.mkdir(parents=True)
    path.write_bytes(warmed.path.read_bytes())
    assert others.find(warmed.target.target) is None
    with pytest.raises(MarkerError, match="of another GPU, DeepGEMM, compiler or setting; it is set aside as "):
        others.load(LAUNCH)
    assert warmed.markers.load(LAUNCH) is not None


def test_every_part_of_the_identity_is_tried_above() -> None:
    assert {name for change in CHANGES for name in change} == set(Identity.__struct_fields__)


@pytest.mark.parametrize("launch", [{}, {"model": "deepseek", "rank": "1"}, {"model": "deepseek"}])
def test_a_marker_of_another_launch_is_not_its_own_but_its_targets_are_known(
    warmed: Warmed, launch: dict[str, str]
) -> None:
    assert warmed.markers.load(launch) is None
    assert warmed.markers.find(warmed.target.target) == warmed.target


def test_a_marker_in_the_place_of_another_launch_is_refused(warmed: Warmed) -> None:
    other = {"model": "another"}
    warmed.path.rename(warmed.markers.path(other))
    with pytest.raises(MarkerError, match="of another launch; it is set aside as "):
        warmed.markers.load(other)


def test_the_order_in_which_a_launch_is_told_does_not_matter(warmed: Warmed) -> None:
    assert warmed.markers.load(dict(reversed(LAUNCH.items()))) is not None


def test_kernels_under_another_install_path_have_other_names_so_nothing_is_found_for_them(warmed: Warmed) -> None:
    _, moved = recording().of_target("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048, Path("/opt/elsewhere/include"))
    assert not any(warmed.cache.has(kernel.directory) for kernel in moved)


# A marker that is not what it was


@pytest.mark.parametrize("name", ["../victim", "../../victim", "{place}/victim", "victim/.", "", "a\nb", "\x1b[31m"])
def test_a_kernel_whose_name_is_a_path_to_elsewhere_is_neither_read_nor_moved(
    warmed: Warmed, tmp_path: Path, name: str
) -> None:
    name = name.format(place=tmp_path)
    victim = warmed.cache.root / "cache" / name
    if "victim" in name:
        victim.mkdir(parents=True)
        (victim / "kernel.cu").write_text("")
        (victim / "kernel.cubin").write_bytes(real_cubin())
    text = warmed.path.read_text().replace(warmed.kernels[0].directory, json.dumps(name)[1:-1])
    warmed.path.write_text(text)
    assert f": damaged: not a kernel's directory: {name!r}; it is set aside" in warmed.refusal()
    assert "victim" not in name or (victim / "kernel.cubin").read_bytes() == real_cubin()


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_marker_that_was_cut_off_is_set_aside(warmed: Warmed, length: int) -> None:
    warmed.path.write_bytes(warmed.path.read_bytes().rstrip()[:length])
    assert warmed.markers.find(warmed.target.target) is None
    assert "damaged" in warmed.refusal()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda marker: marker.update(format=FORMAT + 1), f"of format {FORMAT + 1}, expected {FORMAT}"),
        (lambda marker: marker.update(targets=None), "damaged: "),
        (lambda marker: marker["files"].pop(), "damaged: its targets and its files do not agree"),
        (lambda marker: marker["targets"].pop(), "damaged: its targets and its files do not agree"),
    ],
    ids=["format", "type", "files", "targets"],
)
def test_a_marker_that_makes_no_sense_is_set_aside(
    warmed: Warmed, damage: Callable[[dict[str, list[object]]], object], reason: str
) -> None:
    marker = msgspec.json.decode(warmed.path.read_bytes())
    damage(marker)
    warmed.path.write_bytes(msgspec.json.encode(marker))
    assert reason in warmed.refusal()


# Kernels that are not what they were


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda path: _remove_kernel(path.parent), "is not in the cache"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"is not what it was \(\d+ of \d+ bytes\)"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"is not what it was \(\d+ of \d+ bytes\)"),
    "empty": (lambda path: path.write_bytes(b""), r"is not what it was \(0 of \d+ bytes\)"),
    "changed": (_flip_a_bit, r"is not what it was \(changed\)"),
    "without cubin": (Path.unlink, r"is not what it was \(no cubin\)"),
    "without source": (lambda path: path.with_name("kernel.cu").unlink(), r"is not what it was \(no source\)"),
}


def _remove_kernel(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_is_said_in_a_line_moved_out_of_the_way_and_made_again(
    warmed: Warmed, tmp_path: Path, damage: str
) -> None:
    do, reason = DAMAGES[damage]
    do(warmed.cubin)
    refusal = warmed.refusal()
    assert f"{warmed.kernels[0].directory} is not" in refusal
    assert re.search(reason, refusal)
    # Nothing that DeepGEMM would load, or abort for.
    assert damage.startswith("without") or not warmed.cache.path(warmed.kernels[0].directory).exists()
    assert warmed.cache.has(warmed.kernels[1].directory)

    order = Order(warmed.cache.root, write_copying_compiler(tmp_path).compiler, tuple(warmed.kernels))
    assert compile_all(order).compiled == 1
    warmed.markers.add(LAUNCH, [warmed.target])
    assert warmed.markers.load(LAUNCH) is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_target_with_a_damaged_kernel_is_not_known(warmed: Warmed, damage: str) -> None:
    other = warmed.another_target()
    warmed.markers.add(LAUNCH, [other])
    DAMAGES[damage][0](warmed.cubin)
    assert warmed.markers.find(warmed.target.target) is None
    assert warmed.markers.find(other.target) == other


def test_only_the_first_of_many_damaged_kernels_is_named(warmed: Warmed) -> None:
    for kernel in warmed.kernels:
        _flip_a_bit(warmed.cache.path(kernel.directory) / "kernel.cubin")
    assert "(changed) and 1 more; it is set aside" in warmed.refusal()


# Writing


def test_targets_are_added_to_what_a_marker_has_and_replace_their_own_kernels(warmed: Warmed) -> None:
    other = warmed.another_target()
    fewer = TargetKernels(warmed.target.target, warmed.target.kernels[:1])
    warmed.markers.add(LAUNCH, [other])
    warmed.markers.add(LAUNCH, [fewer])
    marker = warmed.markers.load(LAUNCH)
    assert marker is not None
    assert set(marker.targets) == {other, fewer}
    wanted = {use.directory for each in (other, fewer) for use in each.kernels}
    assert {file.directory for file in marker.files} == wanted


def test_a_marker_is_not_written_for_a_kernel_that_is_not_there(warmed: Warmed) -> None:
    before = warmed.path.read_bytes()
    absent = TargetKernels(warmed.target.target, (KernelUse(1, "kernel.absent." + "0" * 32),))
    with pytest.raises(FileNotFoundError):
        warmed.markers.add(LAUNCH, [absent])
    assert warmed.path.read_bytes() == before


def test_a_damaged_marker_is_written_anew(warmed: Warmed) -> None:
    warmed.path.write_bytes(b"{")
    warmed.markers.add(LAUNCH, [warmed.target])
    assert warmed.markers.load(LAUNCH) is not None


def test_a_cache_that_cannot_be_written_raises_what_the_disk_says(tmp_path: Path, warmed: Warmed) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        Markers(KernelCache(tmp_path / "file"), IDENTITY).add(LAUNCH, [warmed.target])


def test_what_a_killed_process_has_left_goes_when_a_marker_is_written(warmed: Warmed) -> None:
    left = [warmed.cache.scratch / name for name in ("warmstart-old", "warmstart-young", "of DeepGEMM")]
    for path in left:
        path.mkdir(parents=True)
    for path in (left[0], left[2]):
        os.utime(path, (0, 0))
    warmed.markers.add(LAUNCH, [warmed.target])
    assert [path.is_dir() for path in left] == [False, True, True]


def test_ranks_that_add_at_the_same_time_lose_nothing(warmed: Warmed) -> None:
    """Each of eight processes adds a target of its own to the same marker."""
    with multiprocessing.get_context("fork").Pool(8) as processes:
        processes.starmap(_add_target, [(warmed.cache.root, warmed.target, n) for n in range(8)])
    marker = warmed.markers.load(LAUNCH)
    assert marker is not None
    assert {each.target.n for each in marker.targets} == {warmed.target.target.n, *range(8)}


def _add_target(root: Path, like: TargetKernels, n: int) -> None:
    target = msgspec.structs.replace(like.target, n=n)
    Markers(KernelCache(root), IDENTITY).add(LAUNCH, [msgspec.structs.replace(like, target=target)])
