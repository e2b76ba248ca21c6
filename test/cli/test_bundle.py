"""`sglang-warmstart plan` and `bundle`, as they are called: what they say, and how they end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest
from kit.bundles import Bundle, bundle_of, cubin
from kit.installed import install
from kit.plans import LAUNCH, identity_in, real_plan, write_plan
from kit.toolchain import toolchain
from rich.console import Console
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.signature import PrivateKey
from sglang_warmstart.cli import app
from sglang_warmstart.cli.show import show_plan
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.marker import Markers
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan, Part
from sglang_warmstart.libraries.recipe import Recipe
from typer.testing import CliRunner, Result

SHAPES = (("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048), ("TF32_HC_PRENORM_GEMM", 24, 28672))


def run(*arguments: object, **environment: str) -> Result:
    """Run it in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result) -> str:
    """The one line of a command that did nothing."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def whole(kernels: int | None = None) -> Bundle:
    plan = real_plan(SHAPES)
    return bundle_of(
        plan,
        [cubin(name.encode()) for name in list(plan.kernels)[:kernels]],
        {"HASH/kernel.cubin": b"compiled"},
        failed="nvcc: exit status 1\nand its reasons",
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(whole().archive())
    return path


@pytest.fixture
def deep_gemm(tmp_path: Path) -> Path:
    return install(tmp_path / "site-packages")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and a compiler."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    monkeypatch.delenv("SGLANG_DG_CACHE_DIR", raising=False)
    return tmp_path / "home"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one, as openssl makes them."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


# inspect and verify


def test_inspect_says_what_is_in_it_and_for_what(bundle: Path) -> None:
    result = run("bundle", "inspect", bundle)
    assert result.exit_code == 0
    assert "sgl-deep-gemm 0.1.0 (build " in result.stdout
    assert "nvcc 13.0.88" in result.stdout
    assert "rank 0 (tp 1, pp 1) on NVIDIA H200: 132 SMs, sm_90" in result.stdout
    assert "<TF32_HC_PRENORM_GEMM> N=24 K=28672 num_groups=" in result.stdout
    assert "cache of triton: 1 files, 8 bytes" in result.stdout


def test_inspect_as_json(bundle: Path) -> None:
    said = json.loads(run("bundle", "inspect", "--json", bundle).stdout)
    assert (said["kernels"], said["compiled"], said["archs"], said["nvcc"]) == (3, 3, ["sm_90"], "13.0.88")
    assert said["bytes"] == bundle.stat().st_size
    assert [len(launch["targets"]) for launch in said["launches"]] == [2]
    assert said["files"] == dict(sorted(whole().manifest.files.items()))


def test_kernels_that_failed_are_named_with_the_first_line_of_why(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(whole(kernels=1).archive())
    said = run("bundle", "inspect", path).stdout
    assert "2 of them are not compiled" in said
    assert said.count("nvcc: exit status 1") == 2
    assert "and its reasons" not in said


def test_verify_says_that_all_is_well(bundle: Path) -> None:
    result = run("bundle", "verify", bundle)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{bundle}: 4 files (")
    assert "as they should be, 3 kernels" in result.stdout


def test_verify_finds_what_is_no_kernel(tmp_path: Path) -> None:
    plan = real_plan()
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, [b"no cubin", cubin()]).archive())
    result = run("bundle", "verify", path)
    assert result.exit_code == 1
    assert f"{next(iter(plan.kernels))}: not a 64-bit ELF file" in result.stderr
    said = json.loads(run("bundle", "verify", "--json", path).stdout)
    assert (said["ok"], len(said["defects"])) == (False, 1)


@pytest.mark.parametrize("command", ["inspect", "verify", "unpack"])
def test_one_that_is_damaged_or_not_there_is_refused_by_name(command: str, bundle: Path, deep_gemm: Path) -> None:
    more = ["--deep-gemm", deep_gemm] if command == "unpack" else []
    data = bundle.read_bytes()
    for content in (b"", data[:10], data[:-10]):
        bundle.write_bytes(content)
        assert refused(run("bundle", command, bundle, *more)).startswith(f"{bundle}: it is cut off: ")
    bundle.unlink()
    assert refused(run("bundle", command, bundle, *more)) == f"{bundle}: No such file or directory\n"


def test_a_narrow_terminal_shows_all_that_a_wide_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    plan = real_plan(SHAPES)
    (launch,) = plan.launches
    renamed = [
        msgspec.structs.replace(each, target=msgspec.structs.replace(each.target, kernel_type=f"[{number}]"))
        for number, each in enumerate(launch.targets)
    ]
    launch = msgspec.structs.replace(launch, targets=tuple(renamed), gpu="a GPU [bold]")
    said = {}
    for width in (40, 120):
        show_plan(
            msgspec.structs.replace(plan, launches=(launch,)),
            Console(width=width, force_terminal=True, color_system=None),
        )
        said[width] = capsys.readouterr().out
    for text in said.values():
        assert all(word in text for word in ("[0]", "[1]", "7168", "2048", "28672", "132", "16384", "a GPU [bold]"))
        assert "\u2026" not in text, "nothing is cut off"
    assert "largest M" in said[120] and "largest M" not in said[40], "a table, and lines"


# Signatures


def test_what_one_key_has_signed_no_other_has(tmp_path: Path, keys: tuple[Path, Path], deep_gemm: Path) -> None:
    made = whole()
    signed, unsigned = tmp_path / "signed.tar.zst", tmp_path / "unsigned.tar.zst"
    signed.write_bytes(made.archive(PrivateKey.load(keys[0]).sign(manifests.encode(made.manifest))))
    unsigned.write_bytes(made.archive())
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "o.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "o.pem", "-pubout", "-out", other], check=True)
    assert "signed by the required key" in run("bundle", "verify", signed, "--require-signature", keys[1]).stdout
    for command in (["inspect"], ["verify"], ["unpack", "--deep-gemm", deep_gemm, "--cache", tmp_path / "cache"]):
        assert run("bundle", *command, signed, "--require-signature", keys[1]).exit_code == 0
        assert "it is not signed" in refused(run("bundle", *command, unsigned, "--require-signature", keys[1]))
        assert "not by this key" in refused(run("bundle", *command, signed, "--require-signature", other))


# unpack


def test_unpack_says_what_it_has_restored_and_where(bundle: Path, deep_gemm: Path, home: Path) -> None:
    result = run("bundle", "unpack", bundle, "--deep-gemm", deep_gemm)
    cache = home / ".cache" / "deep_gemm"
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{cache}: 3 kernels restored: 2 targets of 1 ranks in ")
    assert result.stderr.startswith("note: triton: not restored: ")
    assert Markers(KernelCache(cache), identity_in(deep_gemm)).load(LAUNCH) is not None


def test_unpack_goes_where_the_server_looks(bundle: Path, deep_gemm: Path, tmp_path: Path) -> None:
    run("bundle", "unpack", bundle, "--deep-gemm", deep_gemm, SGLANG_DG_CACHE_DIR=str(tmp_path / "by switch"))
    run("bundle", "unpack", bundle, "--deep-gemm", deep_gemm, "--cache", tmp_path / "by option")
    for name in ("by switch", "by option"):
        assert Markers(KernelCache(tmp_path / name), identity_in(deep_gemm)).load(LAUNCH) is not None


def test_a_cache_that_others_can_write_is_neither_filled_nor_packed(
    bundle: Path, deep_gemm: Path, cache: Path, tmp_path: Path
) -> None:
    plan, other = write_plan(tmp_path / "plan.json", real_plan(SHAPES)), tmp_path / "other"
    cache.chmod(0o777)
    before = sorted(cache.rglob("*"))
    for command in (
        ("bundle", "unpack", bundle, "--cache", cache, "--deep-gemm", deep_gemm),
        ("bundle", "pack", "--cache", cache, "-o", other),
        ("plan", "export", "--cache", cache, "-o", other),
        ("compile", plan, "-o", cache, "--deep-gemm", deep_gemm),
    ):
        assert f"{cache} can be written by every user (mode 0777), and kernels are code: " in refused(run(*command))
    assert sorted(cache.rglob("*")) == before
    assert not other.exists()
    packed = run("bundle", "pack", "--cache", cache, "-o", other, SGLANG_WARMSTART_SHARED_CACHE="1")
    assert packed.exit_code == 0, packed.output


def test_a_relative_path_is_the_same_place(
    bundle: Path, deep_gemm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("bundle", "unpack", bundle, "--deep-gemm", deep_gemm.relative_to(tmp_path), "--cache", "cache")
    assert Markers(KernelCache(tmp_path / "cache"), identity_in(deep_gemm)).load(LAUNCH) is not None


def test_unpack_as_json(bundle: Path, deep_gemm: Path) -> None:
    said = json.loads(run("bundle", "unpack", "--json", bundle, "--deep-gemm", deep_gemm).stdout)
    assert (said["kernels"], said["kept"], said["targets"], said["launches"]) == (3, 0, 2, 1)
    assert len(said["notes"]) == 1


def test_without_deep_gemm_somebody_has_to_say_where_it_will_be(bundle: Path) -> None:
    assert "name the directory that the server will import it from with --deep-gemm" in refused(
        run("bundle", "unpack", bundle)
    )


def test_one_for_another_deep_gemm_is_refused(tmp_path: Path, deep_gemm: Path) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(msgspec.structs.replace(real_plan(), build="0" * 64), []).archive())
    line = refused(run("bundle", "unpack", path, "--deep-gemm", deep_gemm, "--cache", tmp_path / "cache"))
    assert "for another DeepGEMM" in line
    assert not (tmp_path / "cache").exists()


# pack and plan


@pytest.fixture
def cache(bundle: Path, deep_gemm: Path, tmp_path: Path) -> Path:
    """A cache with a finished warm-up."""
    run("bundle", "unpack", bundle, "--deep-gemm", deep_gemm, "--cache", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_cache_is_packed_and_unpacked_under_another_path(cache: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar.zst"
    result = run("bundle", "pack", "--cache", cache, "-o", packed)
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("3 of 3 kernels")
    there = install(tmp_path / "elsewhere")
    run("bundle", "unpack", packed, "--deep-gemm", there, "--cache", tmp_path / "other")
    assert Markers(KernelCache(tmp_path / "other"), identity_in(there)).load(LAUNCH) is not None


def test_another_librarys_cache_goes_along_if_it_is_asked_for(cache: Path, tmp_path: Path, home: Path) -> None:
    entry = home / ".triton" / "cache" / "HASH"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(b"compiled")
    packed = tmp_path / "packed.tar.zst"
    assert "triton" not in run("bundle", "pack", "--cache", cache, "-o", packed).stdout
    result = run("bundle", "pack", "--cache", cache, "-o", packed, "--include", "triton,tilelang")
    assert result.stdout.rstrip().endswith("3 of 3 kernels, 1 files of triton's cache")
    assert result.stderr == f"note: tilelang: nothing in {home / '.tilelang' / 'cache'}\n"
    (entry / "kernel.cubin").unlink()
    entry.rmdir()
    there = install(tmp_path / "elsewhere")
    said = run("bundle", "unpack", packed, "--deep-gemm", there, "--cache", tmp_path / "other").stdout
    assert "1 files of triton's cache" in said
    assert (entry / "kernel.cubin").read_bytes() == b"compiled"


def _plan_of_builds(*libraries: str) -> BuildPlan:
    recipes = {name: Recipe(name, "a kernel", {"module": "m"}, "made", 3.0) for name in libraries}
    return BuildPlan({name: Part({name: "1"}, "9.0", (recipe,)) for name, recipe in recipes.items()})


def test_how_to_build_a_librarys_kernels_goes_along_with_its_cache(cache: Path, tmp_path: Path) -> None:
    plans, name = cache / build_plan.PLANS, f"words-{'a' * 32}.json"
    plans.mkdir(parents=True)
    (plans / name).write_bytes(build_plan.encode(_plan_of_builds("triton", "flashinfer")))
    (plans / f"launch-{'b' * 16}.json").write_text("{")
    (plans / "of-somebody.json").write_text("{}")
    packed, anew, there = tmp_path / "packed.tar.zst", tmp_path / "anew.tar.zst", install(tmp_path / "elsewhere")
    assert "plans" not in run("bundle", "pack", "--cache", cache, "-o", packed).stdout
    result = run("bundle", "pack", "--cache", cache, "-o", packed, "--include", "triton")
    assert result.stdout.rstrip().endswith("3 of 3 kernels, 1 plans of builds")
    assert f"note: a plan of builds is left out: {plans}/launch-{'b' * 16}.json is no plan of builds" in result.stderr
    run("bundle", "pack", "--from", packed, "-o", anew)
    said = run("bundle", "unpack", anew, "--deep-gemm", there, "--cache", tmp_path / "other").stdout
    assert "1 plans of builds" in said
    assert build_plan.load(tmp_path / "other" / build_plan.PLANS / name) == _plan_of_builds("triton")
    # That of a start on this machine stays.
    (tmp_path / "other" / build_plan.PLANS / name).write_bytes(build_plan.encode(_plan_of_builds("tvm-ffi")))
    said = run("bundle", "unpack", anew, "--deep-gemm", there, "--cache", tmp_path / "other").stdout
    assert "plans of builds" not in said
    assert build_plan.load(tmp_path / "other" / build_plan.PLANS / name) == _plan_of_builds("tvm-ffi")


def test_a_library_that_is_not_known_is_refused(cache: Path, tmp_path: Path) -> None:
    line = refused(run("bundle", "pack", "--cache", cache, "-o", tmp_path / "p", "--include", "cutlass"))
    assert line.startswith("--include: no library 'cutlass': choose among triton, flashinfer, tilelang")


def test_a_bundle_is_packed_anew_with_a_signature(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar.zst"
    assert run("bundle", "pack", "--from", bundle, "-o", packed, "--sign", keys[0]).exit_code == 0
    assert run("bundle", "verify", packed, "--require-signature", keys[1]).exit_code == 0
    said = [json.loads(run("bundle", "inspect", "--json", path).stdout) for path in (bundle, packed)]
    assert said[0]["files"] == said[1]["files"]
    assert said[0]["caches"] == said[1]["caches"]


def test_what_failed_is_still_said_to_have_failed_when_it_is_packed_anew(tmp_path: Path) -> None:
    path, packed = tmp_path / "bundle.tar.zst", tmp_path / "packed.tar.zst"
    path.write_bytes(whole(kernels=1).archive())
    assert run("bundle", "pack", "--from", path, "-o", packed).exit_code == 1
    assert run("bundle", "inspect", packed).stdout.count("nvcc: exit status 1") == 2


def test_an_empty_cache_is_not_packed(tmp_path: Path) -> None:
    line = refused(run("bundle", "pack", "--cache", tmp_path / "empty", "-o", tmp_path / "packed"))
    assert "has no marker of a finished warm-up" in line
    assert not (tmp_path / "packed").exists()


def test_a_plan_is_exported_and_shown(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = run("plan", "export", "--cache", cache, "-o", path)
    assert (result.exit_code, result.stdout) == (0, f"{path}: 3 kernels, 2 targets of 1 ranks\n")
    assert plans.decode(path.read_bytes()) == real_plan(SHAPES)
    said = run("plan", "show", path).stdout
    assert "<GROUPED_GEMM_NT_F8F8BF16_MASKED> N=7168 K=2048" in said
    assert said.rstrip().endswith("3 kernels for 2 targets of 1 ranks")
    assert run("plan", "show", "--json", path).stdout.encode() == path.read_bytes()


def test_a_plan_with_targets_left_out_is_written_and_ends_with_status_1(cache: Path, tmp_path: Path) -> None:
    cubin_path = next((cache / "cache").glob("*/kernel.cubin"))
    cubin_path.write_bytes(cubin_path.read_bytes() + b"changed")
    result = run("plan", "export", "--cache", cache, "-o", tmp_path / "plan.json")
    assert result.exit_code == 1
    assert "is not what it was" in result.stderr
    assert len(plans.decode((tmp_path / "plan.json").read_bytes()).launches[0].targets) == 1


def test_what_pip_has_to_install_is_the_plans(tmp_path: Path) -> None:
    said = run("plan", "requirements", write_plan(tmp_path / "plan.json", real_plan())).stdout.splitlines()
    pinned = (Path(__file__).parents[1] / "requirements-toolchain.txt").read_text().splitlines()
    exact = [line for line in said if not line.endswith(".*")]
    assert set(exact) <= set(pinned)
    assert {"nvidia-cuda-nvcc==13.0.88", "sgl-deep-gemm==0.1.0"} <= set(exact)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert refused(run("plan", "show", tmp_path / "plan.json")).startswith(f"{tmp_path / 'plan.json'}: not a plan: ")
    assert refused(run("plan", "show", tmp_path / "none")) == f"{tmp_path / 'none'}: No such file or directory\n"
