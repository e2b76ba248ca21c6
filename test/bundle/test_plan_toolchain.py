"""The compiler and the headers are found where they are, and those that are not the plan's are refused."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from kit.compile_runs import small_deep_gemm, small_plan
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from kit.environment import python_path
from kit.fake_nvcc import FakeNvcc
from kit.plans import real_plan
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.bundle import toolchain as toolchains
from sglang_warmstart.bundle.toolchain import Pinned, Toolchain, ToolchainError
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.identity import headers_hash

REQUIREMENTS = Path(__file__).parents[1] / "requirements-toolchain.txt"


@pytest.fixture
def deep_gemm(tmp_path: Path) -> Path:
    return small_deep_gemm(tmp_path / "site-packages")


def _nvcc(directory: Path) -> Path:
    return FakeNvcc(directory).path


def _error(environment: dict[str, str], nvcc: str | None, deep_gemm: Path | str | None) -> str:
    with pytest.raises(ToolchainError) as caught:
        toolchains.find("nvcc", environment, nvcc, None if deep_gemm is None else str(deep_gemm))
    (line,) = str(caught.value).splitlines()
    return line


# Where they are looked for


def test_a_compiler_that_is_named_goes_before_cuda_home_and_that_before_the_path(
    tmp_path: Path, deep_gemm: Path
) -> None:
    named, in_home, on_path = (_nvcc(tmp_path / place) for place in ("named", "home/bin", "path"))
    environment = {"PATH": f"{on_path.parent}:{os.environ['PATH']}"}
    assert toolchains.find("nvcc", environment, None, str(deep_gemm)).compiler.path == str(on_path)
    environment["CUDA_HOME"] = str(in_home.parents[1])
    assert toolchains.find("nvcc", environment, None, str(deep_gemm)).compiler.path == str(in_home)
    found = toolchains.find("nvcc", environment, str(named), str(deep_gemm))
    assert found.compiler == Compiler(str(named), recording().compiler, "nvcc", str(tmp_path))
    assert found.include == deep_gemm / "include"


def test_relative_paths_are_those_of_the_directory_where_they_were_named(
    tmp_path: Path, deep_gemm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = _nvcc(tmp_path / "cuda")
    monkeypatch.chdir(tmp_path)
    found = toolchains.find("nvcc", {}, "cuda/nvcc", "site-packages/deep_gemm")
    monkeypatch.chdir("/")
    assert (found.compiler.path, found.deep_gemm) == (str(nvcc), deep_gemm)
    assert found.include.is_dir()


_FIND = """
import os
from sglang_warmstart.bundle import toolchain
found = toolchain.find("nvcc", {"PATH": "/nowhere", "CUDA_HOME": os.environ.get("HOME_OF_CUDA", "")}, None, None)
print(found.compiler.path, found.deep_gemm)
"""


@pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())
@pytest.mark.parametrize("home", ["", "/nowhere"])
def test_without_another_one_that_of_nvidias_packages_is_taken_and_the_deep_gemm_that_is_installed(home: str) -> None:
    found = toolchain()
    # A machine may have a CUDA of its own.
    hidden = in_mount_namespace('[ ! -d /usr/local/cuda/ ] || mount -t tmpfs none "$(readlink -f /usr/local/cuda)"')
    environment = {"PYTHONPATH": python_path(found.root), "HOME_OF_CUDA": home}
    said = run_python(_FIND, prefix=hidden, environment=environment)
    assert said.split() == [str(found.nvcc), str(found.deep_gemm)]


def test_a_compiler_that_is_named_and_not_there_is_not_looked_for_elsewhere(tmp_path: Path, deep_gemm: Path) -> None:
    environment = {"CUDA_HOME": str(_nvcc(tmp_path / "bin").parents[1])}
    assert _error(environment, "/nowhere/nvcc", deep_gemm) == (
        "/nowhere/nvcc is not there, or is no program: name another nvcc with --nvcc"
    )
    # Nor where NVIDIA's packages would be taken if none had been named.
    code = (
        "from sglang_warmstart.bundle import toolchain as t\n"
        "try: t.find('nvcc', {}, '/nowhere/nvcc', None)\n"
        "except t.ToolchainError as error: print(error)"
    )
    said = run_python(code, environment={"PYTHONPATH": python_path(toolchain().root)})
    assert "/nowhere/nvcc is not there" in said


def test_what_is_missing_is_one_line_that_says_what_to_do(tmp_path: Path, deep_gemm: Path) -> None:
    nvcc = str(_nvcc(tmp_path / "cuda"))
    assert _error({"CUDA_HOME": "/nowhere"}, None, deep_gemm) == (
        "CUDA_HOME=/nowhere has no bin/nvcc: install nvidia-cuda-nvcc, or name one with --nvcc"
    )
    assert _error({}, nvcc, None) == (
        "DeepGEMM is not installed here: install sgl-deep-gemm, or name it with --deep-gemm"
    )
    assert _error({}, nvcc, tmp_path) == (
        f"{tmp_path} has no include/deep_gemm: name the directory of the package with --deep-gemm"
    )


def test_a_program_that_does_not_say_its_version_is_refused(tmp_path: Path, deep_gemm: Path) -> None:
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    assert "exit status 3" in _error({}, str(program), deep_gemm)


# Whether they are the plan's


def _check(found: Toolchain, pinned: Pinned) -> str:
    with pytest.raises(ToolchainError) as caught:
        toolchains.check(found, pinned)
    (line,) = str(caught.value).splitlines()
    return line


def _pinned(deep_gemm: Path, **changed: str) -> Pinned:
    return msgspec.structs.replace(Pinned.of(small_plan(deep_gemm, 1)), **changed)


def test_the_toolchain_that_the_real_plan_was_recorded_with_is_accepted_wherever_it_is() -> None:
    found = toolchain()
    plan = real_plan(deep_gemm=Path("/somewhere/else/deep_gemm"))
    toolchains.check(Toolchain(found.compiler(), found.deep_gemm), Pinned.of(plan))


@pytest.mark.parametrize("release", ["12.9.86", "13.0.87", "13.1.80"])
def test_another_release_of_the_compiler_is_refused_and_both_are_named(
    tmp_path: Path, deep_gemm: Path, release: str
) -> None:
    version = f"Cuda compilation tools, release {release.rpartition('.')[0]}, V{release}\n"
    line = _check(Toolchain(Compiler("/opt/bin/nvcc", version), deep_gemm), _pinned(deep_gemm))
    assert line == (
        f"the plan is for nvcc 13.0.88, /opt/bin/nvcc is nvcc {release}: "
        "install what `plan requirements` says, or record the plan anew"
    )


def test_another_nvrtc_is_refused_even_if_nvcc_is_the_same(deep_gemm: Path) -> None:
    nvcc = recording().compiler + "\n"
    pinned = _pinned(deep_gemm, compiler=f"{nvcc}NVRTC 13.0\n", kind="nvrtc")
    toolchains.check(Toolchain(Compiler("/opt/nvcc", f"{nvcc}NVRTC 13.0\n", "nvrtc"), deep_gemm), pinned)
    line = _check(Toolchain(Compiler("/opt/nvcc", f"{nvcc}NVRTC 13.1\n", "nvrtc"), deep_gemm), pinned)
    assert "the plan is for nvcc 13.0.88, NVRTC 13.0, /opt/nvcc is nvcc 13.0.88, NVRTC 13.1: " in line


def test_other_headers_are_refused_and_both_are_named(tmp_path: Path, deep_gemm: Path) -> None:
    other = small_deep_gemm(tmp_path / "other", "// 2\n")
    compiler = Compiler("/opt/nvcc", recording().compiler)
    toolchains.check(Toolchain(compiler, deep_gemm), _pinned(deep_gemm))
    line = _check(Toolchain(compiler, other), _pinned(deep_gemm))
    assert line == (
        f"the plan is for sgl-deep-gemm 0.1.0 (headers {headers_hash(deep_gemm)[:12]}), {other} has a DeepGEMM of "
        f"unknown version (headers {headers_hash(other)[:12]}): install the one of the plan, or record the plan anew"
    )
    # The version is said where there is one.
    information = other.parent / "sgl_deep_gemm-0.2.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sgl-deep-gemm\nVersion: 0.2.0\n")
    assert "has sgl-deep-gemm 0.2.0 (headers " in _check(Toolchain(compiler, other), _pinned(deep_gemm))


def test_headers_that_have_changed_since_the_last_look_are_noticed(deep_gemm: Path) -> None:
    # A worker of a cluster lives for long, and DeepGEMM is installed anew under it.
    found, pinned = Toolchain(Compiler("/opt/nvcc", recording().compiler), deep_gemm), _pinned(deep_gemm)
    toolchains.check(found, pinned)
    (deep_gemm / "include" / "deep_gemm" / "some.cuh").write_text("// 2\n")
    assert "(headers " in _check(found, pinned)


# What pip installs


def _requirements(release: str, kind: str = "nvcc", deep_gemm: str = "sgl-deep-gemm 0.1.0") -> list[str]:
    plan = msgspec.structs.replace(real_plan(), compiler=f"V{release}", kind=kind, deep_gemm=deep_gemm)
    return toolchains.requirements_of(plan)


@pytest.mark.parametrize(
    "deep_gemm", ["--index-url=http://evil x", "evil 1.0", "sgl-deep-gemm 1\n--index-url http://evil", "sgl-deep-gemm"]
)
def test_a_plan_does_not_have_pip_install_what_it_likes(deep_gemm: str) -> None:
    with pytest.raises(ToolchainError, match="is no release of sgl-deep-gemm or deep-gemm: install"):
        toolchains.requirements_of(msgspec.structs.replace(real_plan(), deep_gemm=deep_gemm))


def test_the_requirements_of_the_real_plan_are_what_the_toolchain_was_installed_from() -> None:
    pinned = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    lines = toolchains.requirements_of(msgspec.structs.replace(real_plan(), kind="nvrtc"))
    asked = dict(line.split("==") for line in lines)
    # This one is what cuda-bindings looks for libraries with, and of no CUDA in particular.
    assert asked.keys() == pinned.keys() - {"cuda-pathfinder"}
    for name, version in asked.items():
        assert pinned[name] == version or (
            version.endswith(".*") and pinned[name].startswith(version.removesuffix("*"))
        ), name
    assert {name for name, version in asked.items() if "*" not in version} >= {"nvidia-cuda-nvcc", "sgl-deep-gemm"}


def test_nvrtc_is_asked_for_only_where_the_plan_is_for_it() -> None:
    assert _requirements("13.2.51") == [
        "nvidia-cuda-nvcc==13.2.51",
        "nvidia-cuda-crt==13.2.51",
        "nvidia-nvvm==13.2.51",
        "nvidia-cuda-cccl==13.2.*",
        "nvidia-cuda-runtime==13.2.*",
        "sgl-deep-gemm==0.1.0",
    ]
    assert set(_requirements("13.2.51", "nvrtc")) - set(_requirements("13.2.51")) == {
        "nvidia-cuda-nvrtc==13.2.*",
        "cuda-bindings==13.2.*",
    }


def test_a_deep_gemm_of_unknown_version_cannot_be_asked_for() -> None:
    assert not any("gemm" in line for line in _requirements("13.0.88", deep_gemm=""))


def test_a_compiler_that_is_in_no_package_is_said() -> None:
    with pytest.raises(ToolchainError, match=r"nvcc 12\.9\.86 is in no package .*: install NVIDIA's toolkit 12\.9"):
        _requirements("12.9.86")
