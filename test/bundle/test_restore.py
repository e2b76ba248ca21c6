"""A bundle in a cache: kernels under their names there, markers that a server finds, and nothing good replaced."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from pathlib import Path

import msgspec
import pytest
from kit.bundles import Bundle, bundle_of, cubin
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from kit.installed import install
from kit.node import Node
from kit.plans import LAUNCH, identity_in, real_plan
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.bundle import restore as restoring
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.restore import Place, Restored, restore
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.marker import Markers
from sglang_warmstart.deepgemm.plan import Planner
from sglang_warmstart.deepgemm.target import KernelUse
from sglang_warmstart.node.protocol import Answer, Hello, Warmed, Welcome

SHAPES = (("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048), ("TF32_HC_PRENORM_GEMM", 24, 28672))


def bundle(shapes: tuple[tuple[str, int, int], ...] = SHAPES, kernels: int | None = None) -> Bundle:
    """One that was recorded and compiled under another path; of its kernels so many are compiled."""
    plan = real_plan(shapes, Path("/opt/venv/deep_gemm"))
    return bundle_of(plan, (cubin(name.encode()) for name in list(plan.kernels)[:kernels]))


class Site:
    """A machine on which a server is to start.

    Args:
        directory: of its own.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.deep_gemm = install(directory / "lib" / "python3" / "dist-packages")
        self.environment = {"CUDA_HOME": str(toolchain().cuda_home), "PATH": "", "HOME": str(directory)}
        self.cache = KernelCache(directory / "cache")
        self._numbers = itertools.count()

    @property
    def place(self) -> Place:
        return Place(self.cache.root, self.deep_gemm, self.environment)

    def restore(self, bundle: Bundle, place: Place | None = None) -> Restored:
        with self.written(bundle).open("rb") as stream:
            return restore(stream, place or self.place)

    def written(self, bundle: Bundle) -> Path:
        path = self._directory / f"bundle-{next(self._numbers)}.tar.zst"
        path.write_bytes(bundle.archive())
        return path

    def expected(self, shape: tuple[str, int, int]) -> list[KernelUse]:
        """The kernels of a target under the names that DeepGEMM has for them here."""
        _, kernels = recording().of_target(*shape, self.deep_gemm / "include")
        return sorted(KernelUse(kernel.m, kernel.directory) for kernel in kernels)

    @property
    def markers(self) -> Markers:
        return Markers(self.cache, identity_in(self.deep_gemm))

    @property
    def files(self) -> dict[str, bytes]:
        """All files of the cache but locks."""
        paths = [path for path in self.cache.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {str(path.relative_to(self.cache.root)): path.read_bytes() for path in paths}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# What comes of it


def test_kernels_come_under_the_names_that_deep_gemm_has_for_them_here(site: Site) -> None:
    restored = site.restore(bundle())
    wanted = {use.directory for shape in SHAPES for use in site.expected(shape)}
    assert {path.name for path in site.cache.path("").iterdir()} == wanted
    assert (restored.kernels, restored.kept, restored.targets, restored.launches) == (len(wanted), 0, 2, 1)
    assert restored.notes == []
    for directory in wanted:
        kernel = next(
            each
            for shape in SHAPES
            for each in recording().of_target(*shape, site.deep_gemm / "include")[1]
            if each.directory == directory
        )
        assert (site.cache.path(directory) / "kernel.cu").read_bytes() == kernel.source.encode()
    assert list((site.cache.root / "tmp").iterdir()) == []


def test_a_server_finds_the_marker_and_neither_records_nor_compiles(site: Site, tmp_path: Path) -> None:
    site.restore(bundle())
    hello = Hello(
        cache=str(site.cache.root),
        environment=site.environment,
        deep_gemm=str(site.deep_gemm),
        gpu=Gpu(recording().gpu, 132, (9, 0), 0),
        launch=LAUNCH,
    )
    with Node(tmp_path, library="a_library_that_is_not_there") as node:
        rank = node.client()
        assert rank.hello(hello) == Welcome()
        answer = rank.restore()
        targets = [recording().of_target(*shape, site.deep_gemm / "include")[0] for shape in SHAPES]
        expected = [Warmed(target, tuple(site.expected(shape))) for target, shape in zip(targets, SHAPES, strict=True)]
        assert answer == Answer(tuple(sorted(expected, key=lambda each: each.target)), known=True)


def test_what_is_restored_is_as_good_as_the_marker_of_a_warm_up(site: Site) -> None:
    site.restore(bundle())
    marker = site.markers.load(LAUNCH)
    assert marker is not None
    for each in marker.targets:
        assert site.markers.find(each.target) == each
        assert f"-I{site.deep_gemm}/include" in each.flags[0]


def test_a_second_time_changes_nothing(site: Site) -> None:
    site.restore(bundle())
    before = site.files
    restored = site.restore(bundle())
    assert (restored.kernels, restored.kept, restored.targets) == (0, 3, 2)
    assert site.files == before


# Nothing good is replaced


def test_a_kernel_that_is_there_stays(site: Site) -> None:
    first, *_ = site.expected(SHAPES[0])
    mine = cubin(b"compiled here")
    _, kernels = recording().of_target(*SHAPES[0], site.deep_gemm / "include")
    source = next(kernel.source for kernel in kernels if kernel.directory == first.directory)
    site.cache.publish(first.directory, source, mine)
    restored = site.restore(bundle())
    assert (restored.kernels, restored.kept) == (2, 1)
    assert (site.cache.path(first.directory) / "kernel.cubin").read_bytes() == mine
    # The marker is about the one that is there.
    assert site.markers.load(LAUNCH) is not None


@pytest.mark.parametrize("damage", [b"", b"no cubin", cubin()[:40]])
def test_a_cubin_that_is_none_is_no_good_entry_and_is_replaced(damage: bytes, site: Site) -> None:
    site.restore(bundle())
    first, *_ = site.expected(SHAPES[0])
    path = site.cache.path(first.directory) / "kernel.cubin"
    whole = path.read_bytes()
    path.write_bytes(damage)
    restored = site.restore(bundle())
    assert (restored.kernels, restored.kept) == (1, 2)
    assert path.read_bytes() == whole
    assert site.markers.load(LAUNCH) is not None


def test_half_a_kernel_is_none(site: Site) -> None:
    first, *_ = site.expected(SHAPES[0])
    site.cache.path(first.directory).mkdir(parents=True)
    (site.cache.path(first.directory) / "kernel.cu").touch()
    assert site.restore(bundle()).kernels == 3
    assert site.cache.has(first.directory)


def test_a_marker_that_knows_more_keeps_it(site: Site) -> None:
    site.restore(bundle())
    site.restore(bundle(SHAPES[:1]))
    marker = site.markers.load(LAUNCH)
    assert marker is not None
    assert len(marker.targets) == 2


@pytest.mark.parametrize("launch", [LAUNCH, {**LAUNCH, "rank": "1"}])
def test_markers_go_on_being_good_when_a_kernel_that_was_gone_is_back_with_other_bytes(
    launch: dict[str, str], site: Site
) -> None:
    site.restore(bundle())
    first, *_ = site.expected(SHAPES[0])
    marker = site.markers.load(LAUNCH)
    assert marker is not None
    site.markers.add(launch, marker.targets)
    for path in site.cache.path(first.directory).iterdir():
        path.unlink()
    site.cache.path(first.directory).rmdir()
    plan = real_plan(SHAPES, Path("/opt/venv/deep_gemm"))
    site.restore(bundle_of(plan, (cubin(b"again " + name.encode()) for name in plan.kernels)))
    assert site.markers.load(launch) is not None
    assert site.cache.has(first.directory)


# What is not whole, or not for this machine


def test_a_launch_that_lacks_a_kernel_is_not_taken_for_warmed_and_its_whole_targets_are_known(site: Site) -> None:
    restored = site.restore(bundle(kernels=2))
    assert (restored.kernels, restored.targets) == (2, 1)
    (note,) = restored.notes
    assert note == f"rank 0 on {recording().gpu}: 1 of 2 targets lack kernels"
    # A server finds out its targets, and those that are whole are known.
    assert site.markers.load(LAUNCH) is None
    known = [site.markers.find(recording().of_target(*shape, site.deep_gemm / "include")[0]) for shape in SHAPES]
    assert [each is not None for each in known].count(True) == 1
    assert restored.launches == 0
    # With the rest of it, it is warmed.
    site.restore(bundle())
    assert site.markers.load(LAUNCH) is not None


def test_a_kernel_that_is_missing_in_the_bundle_and_there_in_the_cache_is_enough(site: Site) -> None:
    site.restore(bundle())
    assert site.restore(bundle(kernels=0)).targets == 2


def test_a_stub_is_not_published(site: Site) -> None:
    plan = real_plan(SHAPES[:1])
    with pytest.raises(BundleError, match="a recorder's stub: none of its kernels is restored"):
        site.restore(bundle_of(plan, [cubin(b"sglang_warmstart_stub"), cubin()]))
    assert site.files == {}


def test_another_build_of_deep_gemm_is_refused_with_both_named_before_anything_is_written(
    site: Site, tmp_path: Path
) -> None:
    plan = msgspec.structs.replace(real_plan(SHAPES), build="0" * 64, deep_gemm="sgl-deep-gemm 0.1.4")
    with pytest.raises(
        BundleError, match=r"for another DeepGEMM: sgl-deep-gemm 0\.1\.4 \(build 000000000000\), in .* is .* \(build "
    ):
        site.restore(bundle_of(plan, []))
    assert site.files == {}


def test_another_compiler_is_refused_with_both_named(site: Site, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.41'\n")
    nvcc.chmod(0o755)
    site.environment["DG_JIT_NVCC_COMPILER"] = str(nvcc)
    with pytest.raises(BundleError, match=r"for another compiler: nvcc 13\.0\.88, .*/bin/nvcc is nvcc 12\.9\.41"):
        site.restore(bundle())
    assert site.files == {}


def test_a_compiler_that_deep_gemm_takes_for_the_same_will_do_and_the_marker_is_for_it(
    site: Site, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(0o755)
    site.environment["DG_JIT_NVCC_COMPILER"] = str(nvcc)
    restored = site.restore(bundle())
    assert restored.notes == ["its kernels were compiled by nvcc 13.0.88, here is 13.0.48"]
    here = identity_in(site.deep_gemm, compiler="Cuda compilation tools, release 13.0, V13.0.48\n")
    assert Markers(site.cache, here).load(LAUNCH) is not None


def test_where_there_is_no_deep_gemm_and_no_compiler_yet_the_bundle_is_taken_at_its_word(site: Site) -> None:
    there = Path("/usr/lib/python3/dist-packages/deep_gemm")
    restored = site.restore(bundle(), Place(site.cache.root, there, {"PATH": "", "CUDA_HOME": "/nonexistent"}))
    assert len(restored.notes) == 2
    assert "could not be seen" in restored.notes[0]
    assert "is taken to be the bundle's" in restored.notes[1]
    assert Markers(site.cache, identity_in(there)).load(LAUNCH) is not None


def test_nothing_of_a_damaged_bundle_is_restored(site: Site) -> None:
    path = site.written(bundle())
    data = bytearray(path.read_bytes())
    data[len(data) * 9 // 10] ^= 1
    path.write_bytes(data)
    with path.open("rb") as stream, pytest.raises(BundleError):
        restore(stream, site.place)
    assert not site.cache.root.exists()


# Other libraries


def test_files_of_another_librarys_cache_come_along_where_its_key_is_the_same(site: Site) -> None:
    from sglang_warmstart.libraries.table import LIBRARIES

    triton = LIBRARIES["triton"]
    whole = bundle_of(real_plan(SHAPES[:1]), [cubin(b"1"), cubin(b"2")], {"HASH/kernel.cubin": b"compiled"})
    (cache,) = whole.manifest.caches
    mine = msgspec.structs.replace(cache, key=triton.key(site.environment))
    same = Bundle(msgspec.structs.replace(whole.manifest, caches=(mine,)), whole.contents)
    restored = site.restore(same)
    assert restored.libraries == {"triton": (1, 0)}
    assert (triton.root(site.environment) / "HASH" / "kernel.cubin").read_bytes() == b"compiled"
    other = site.restore(whole)
    assert other.libraries == {}
    assert other.notes[0].startswith("triton: not restored: ")


def test_a_librarys_cache_that_cannot_be_written_is_a_note_and_deep_gemm_has_its_markers(
    site: Site, tmp_path: Path
) -> None:
    from sglang_warmstart.libraries.table import LIBRARIES

    (tmp_path / ".triton").write_text("a file where a directory should be")
    whole = bundle_of(real_plan(SHAPES[:1]), [cubin(b"1"), cubin(b"2")], {"HASH/kernel.cubin": b"compiled"})
    (cache,) = whole.manifest.caches
    mine = msgspec.structs.replace(cache, key=LIBRARIES["triton"].key(site.environment))
    restored = site.restore(Bundle(msgspec.structs.replace(whole.manifest, caches=(mine,)), whole.contents))
    (note,) = restored.notes
    assert note.startswith("triton: not all of it is restored: ")
    assert site.markers.load(LAUNCH) is not None


def test_what_a_bundle_says_of_itself_cannot_forge_a_line_of_the_log(site: Site) -> None:
    planner = Planner(identity_in(Path("/opt/deep_gemm")), "sgl-deep-gemm 0.1.0", "0")
    targets = [recording().of_target(*SHAPES[0], Path("/opt/deep_gemm/include"))]
    planner.add(identity_in(Path("/opt/deep_gemm")), {"rank": "0\n[now] all is well \x1b[31m"}, targets)
    (note,) = site.restore(bundle_of(planner.plan(), [])).notes
    assert note.isprintable()


def test_what_was_left_by_one_that_was_killed_long_ago_is_removed(site: Site) -> None:
    for name in ("warmstart-bundle-old", "warmstart-old", "warmstart-bundle-fresh", "of others"):
        (site.cache.root / "tmp" / name).mkdir(parents=True)
        if "fresh" not in name:
            os.utime(site.cache.root / "tmp" / name, (0, 0))
    site.restore(bundle())
    assert {path.name for path in (site.cache.root / "tmp").iterdir()} == {"warmstart-bundle-fresh", "of others"}


def test_a_library_that_is_not_known_is_a_note(site: Site) -> None:
    whole = bundle_of(real_plan(SHAPES[:1]), [cubin(b"1"), cubin(b"2")], {"a/b": b"c"})
    (cache,) = whole.manifest.caches
    strange = msgspec.structs.replace(cache, library="cutlass")
    restored = site.restore(Bundle(msgspec.structs.replace(whole.manifest, caches=(strange,)), whole.contents))
    assert restored.notes == ["cutlass: this version knows no such cache"]
    assert restored.kernels == 2


# What goes wrong on the way


_ON_A_FULL_DISK = """
import pathlib, sys
from sglang_warmstart.bundle.restore import BundleError, Place, restore
from sglang_warmstart.deepgemm.cache import KernelCache
bundle, root, deep_gemm = map(pathlib.Path, sys.argv[1:])
with bundle.open("rb") as stream:
    try:
        restore(stream, Place(root, deep_gemm, {"PATH": "", "CUDA_HOME": "/nonexistent"}))
    except BundleError as error:
        print(error)
cache = KernelCache(root)
whole = [path.name for path in cache.path("").glob("*") if cache.has(path.name)]
print(len(whole), cache.broken(), list((root / "tmp").glob("*")))
"""


@pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts() or "mounts")
@pytest.mark.parametrize("size", [4, 16, 24, 32])
def test_on_a_full_disk_it_ends_with_one_line_and_what_is_there_is_whole(size: int, site: Site, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    prefix = in_mount_namespace(f"mount -t tmpfs -o size={size}k none {tmp_path / 'small'}")
    arguments = map(str, (site.written(bundle()), tmp_path / "small" / "root", site.deep_gemm))
    said, left = run_python(_ON_A_FULL_DISK, *arguments, prefix=prefix).splitlines()
    assert "cannot be written (No space left on device): make room" in said
    assert left.endswith(" [] []")


def restore_and_die(path: Path, place: Place, left: int) -> None:
    """End without a word before the next rename, link or mkdir, once so many were made."""
    counter = itertools.count()

    def dying(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if next(counter) == left:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in ("rename", "replace", "mkdir", "link"):
        dying(name)
    with path.open("rb") as stream:
        restore(stream, place)
    os._exit(0)


def test_killed_at_any_moment_what_is_there_is_whole_and_a_second_time_completes_it(site: Site, tmp_path: Path) -> None:
    path = site.written(bundle())
    context = multiprocessing.get_context("fork")
    for left in itertools.count():
        place = Place(tmp_path / f"cache-{left}", site.deep_gemm, site.environment)
        process = context.Process(target=restore_and_die, args=(path, place, left))
        process.start()
        process.join()
        cache = KernelCache(place.cache)
        assert cache.broken() == []
        with path.open("rb") as stream:
            restored = restore(stream, place)
        assert restored.kernels + restored.kept == 3
        assert Markers(cache, identity_in(site.deep_gemm)).load(LAUNCH) is not None
        if process.exitcode == 0:
            assert left > 10  # it was killed at many moments
            return


def test_four_at_once_on_one_cache_restore_it_once(site: Site) -> None:
    path = site.written(bundle())
    context = multiprocessing.get_context("fork")

    def run() -> None:
        with path.open("rb") as stream:
            restore(stream, site.place)

    processes = [context.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    marker = site.markers.load(LAUNCH)
    assert marker is not None and len(marker.targets) == 2
    assert len(list(site.cache.path("").iterdir())) == 3


def test_a_cubin_that_is_none_is_found_by_verifying(site: Site, tmp_path: Path) -> None:
    from sglang_warmstart.bundle import archive

    plan = real_plan(SHAPES[:1])
    path = site.written(bundle_of(plan, [b"no cubin", cubin(b"sglang_warmstart_stub")]))
    with path.open("rb") as stream:
        manifest = archive.read(stream)
        (tmp_path / "files").mkdir()
        archive.extract(stream, manifest, tmp_path / "files")
    defects = restoring.defects_of(manifest, manifest.cubins, tmp_path / "files")
    assert [defect.split(": ")[1] for defect in defects] == ["not a 64-bit ELF file", "a recorder's stub"]
