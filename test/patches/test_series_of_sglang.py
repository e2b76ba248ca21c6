"""The committed series for the installed SGLang: applied as a fork does, carried by the package, beside the plugin."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kit.environment import NO_PLUGIN, child_environment, python_path
from making import contents, git, repository, run, write
from series import COMMITTED, LAYOUT, RELEASE, SERIES, Fork
from sglang_warmstart.cli.patches import SHIPPED, directories, patches_in, subject
from sglang_warmstart.sglang.feature import find_built_in
from sglang_warmstart.sglang.features import FEATURES

pytestmark = pytest.mark.release("0.5.12", "0.5.23")

REPOSITORY = Path(__file__).parents[2]
on_0_5_12 = pytest.mark.skipif(RELEASE != "0.5.12", reason="is about the series for SGLang 0.5.12")

# Of 0.5.12. The number of each feature's patch, after which a tree has it. The others are the plugin's alone.
PATCH_OF = {
    "fast-warmup": 2,
    "attn-tp-gather": 3,
    "hc-prenorm": 4,
    "mhc-prewarm": 4,
    "pp-parallel-warmup": 5,
    "exact-warmup": 6,
}


def test_the_series_file_names_every_patch_once_in_the_order_of_their_numbers() -> None:
    assert sorted(COMMITTED.glob("*.patch")) == SERIES
    assert [int(path.name[:4]) for path in SERIES] == [*range(1, len(SERIES) + 1)]


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name[:4])
def test_each_patch_tells_a_reviewer_what_he_asks_and_knows_the_package_only_where_it_calls_it(patch: Path) -> None:
    message, _, diff = patch.read_text(encoding="utf-8").partition("\n---\n")
    for part in ("\nSwitched off: ", "\nTested: ", "\nUpstream: "):
        assert part in message
    assert max(map(len, message.splitlines()[4:])) <= 72
    assert "GIT binary patch" not in diff
    # SGLang's own files are edited. What is new is a test of SGLang's own kind.
    added = re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)", diff, re.MULTILINE)
    assert all(name.startswith("test/registered/unit/") for name in added)
    assert ("sglang_warmstart" in diff) is (RELEASE == "0.5.12" and patch == SERIES[-1])


def test_the_log_of_a_fork_tells_the_series(fork: Fork) -> None:
    subjects = git(fork.tree, "log", "--format=%s", "--reverse", "base..main").decode().splitlines()
    assert subjects == [subject(patch) for patch in SERIES]


def package_files(fork: Fork, number: int) -> dict[str, bytes]:
    """The files of the package that the series touches, and what tells its version, after so many patches."""
    holder = fork.at(number)
    touched = git(holder, "diff", "--name-only", "--relative", "base", "main").decode().split()
    return {path: (holder / path).read_bytes() for path in [*touched, "sglang/__init__.py", "sglang/_version.py"]}


def test_apply_makes_what_git_am_makes_and_revert_takes_it_back(fork: Fork, tmp_path: Path) -> None:
    before, after = package_files(fork, 0), package_files(fork, len(SERIES))
    write(tmp_path, before)
    for action, made in (("apply", after), ("revert", before)):
        assert run(SHIPPED, action, tmp_path).status == 0
        assert contents(tmp_path) == made


def test_an_unpacked_wheel_takes_the_series_by_git_am(fork: Fork, tmp_path: Path) -> None:
    repository(tmp_path, package_files(fork, 0))
    git(tmp_path, "am", "--quiet", *LAYOUT.am_in_wheel, *map(str, SERIES))
    assert contents(tmp_path) == package_files(fork, len(SERIES))


@on_0_5_12
def test_a_wheel_carries_the_series_and_lists_it(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its traces
    for name in ("python", "patches"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = {path: text for path, text in contents(REPOSITORY / "patches").items() if path != "README.md"}
    assert contents(tmp_path / "site" / "sglang_warmstart" / "cli" / "patches_data") == shipped
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sglang_warmstart.cli import main; main()"
    listed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), "patches", "list"], capture_output=True, text=True
    )
    for version, directory in directories(SHIPPED).items():
        assert f"SGLang {version}: {len(patches_in(directory))} patches\n" in listed.stdout


@on_0_5_12
@pytest.mark.parametrize("number", range(len(SERIES) + 1))
def test_the_plugin_finds_what_a_tree_has(number: int, fork: Fork) -> None:
    tree = fork.at(number)
    found = {feature.name for feature in FEATURES if find_built_in(feature, tree / "sglang")}
    assert found == {name for name, patch in PATCH_OF.items() if patch <= number}


def environment_of(tree: Path, **extra: str | None) -> dict[str, str]:
    """Of a process that imports SGLang from a tree."""
    return child_environment({"SGLANG_PLUGINS": None, "PYTHONPATH": python_path(tree), **extra})


# What exact warm-up is told, what SGLang sweeps, and what is said, in a rank of a patched SGLang.
RANK = """
import json, logging, sys
if sys.argv[1] == "no package":
    sys.modules["sglang_warmstart"] = None
lines, told, swept = [], [], []
logging.basicConfig(level=logging.INFO)
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger().addHandler(handler)
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.deep_gemm_wrapper import compile_utils
from sglang.srt.server_args import ServerArgs
if sys.argv[1] != "no package":
    from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup
    connect = ExactWarmup.connect
    ExactWarmup.connect = lambda exact, *arguments: told.append(1) or connect(exact, *arguments)
compile_utils._compile_deep_gemm_one_type_all = lambda m_list, **_: swept.append(len(m_list))
compile_utils.update_deep_gemm_config(0, ServerArgs("dummy", chunked_prefill_size=8192))
for _ in range(2):
    with compile_utils.deep_gemm_execution_hook(5, 64, 32, 1, compile_utils.DeepGemmKernelType.GEMM_NT_F8F8BF16):
        pass
said = [line for line in lines if "No exact warm-up" in line]
print("found", json.dumps([len(told), swept, said, any("built in: " in line for line in lines)]))
"""


@on_0_5_12
@pytest.mark.parametrize(
    ("installed", "plugins", "told", "said", "plugin_speaks"),
    [
        ("both", None, 1, [], True),
        pytest.param("both", NO_PLUGIN["SGLANG_PLUGINS"], 1, [], False, marks=pytest.mark.long),
        ("no package", NO_PLUGIN["SGLANG_PLUGINS"], 0, ["No exact warm-up of DeepGEMM: "], False),
    ],
    ids=["beside the plugin", "with other plugins", "without the package"],
)
def test_the_last_patch_calls_the_package_once_and_does_without_it(
    installed: str, plugins: str | None, told: int, said: list[str], plugin_speaks: bool, fork: Fork
) -> None:
    environment = environment_of(fork.at(len(SERIES)), SGLANG_PLUGINS=plugins)
    done = subprocess.run(
        [sys.executable, "-c", RANK, installed], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("found ")[2])
    # Without a GPU exact warm-up leaves each GEMM to SGLang, which sweeps it once.
    assert found[:2] == [told, [16384]]
    assert [line[: len(said[0])] for line in found[2]] == said if said else found[2] == []
    assert found[3] is plugin_speaks
