"""The committed series, applied as a fork maintainer does, beside the plugin, and without the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.environment import child_environment
from kit.release import sglang_directory
from kit.server import Server
from sglang_warmstart.cli.patches import patches_in

pytestmark = pytest.mark.release("0.5.12")

PATCHES = Path(__file__).parents[2] / "patches"
COMMITTED = PATCHES / "sglang-0.5.12"
SERIES = patches_in(COMMITTED)

# The number of each feature's patch, after which a tree has it.
FEATURES = {
    "fast-warmup": 2,
    "attn-tp-gather": 3,
    "hc-prenorm": 4,
    "mhc-prewarm": 4,
    "pp-parallel-warmup": 5,
    "exact-warmup": len(SERIES),
}


def names() -> list[str]:
    """The patches in their order, as `series` has them."""
    lines = (COMMITTED / "series").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_series_file_names_every_patch_once_in_the_order_of_their_numbers() -> None:
    assert names() == sorted(path.name for path in COMMITTED.glob("*.patch"))
    assert [int(name[:4]) for name in names()] == [*range(1, len(SERIES) + 1)]


@pytest.mark.parametrize("name", names())
def test_each_patch_tells_a_reviewer_what_he_asks(name: str) -> None:
    message, _, diff = (COMMITTED / name).read_text(encoding="utf-8").partition("\n---\n")
    for part in ("\nSwitched off: ", "\nTested: ", "\nUpstream: "):
        assert part in message
    assert max(map(len, message.splitlines()[4:])) <= 72
    assert "GIT binary patch" not in diff


def hunks(patch: Path) -> Iterator[list[str]]:
    """The hunks of a patch, without their heads."""
    for hunk in re.split(r"^@@ .*\n", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        yield hunk.partition("\ndiff --git ")[0].splitlines()


@pytest.mark.parametrize("name", names())
def test_a_patch_has_no_more_of_sglang_than_it_needs_to_find_its_place(name: str) -> None:
    for hunk in hunks(COMMITTED / name):
        for lines in (hunk, hunk[::-1]):
            leading = next(number for number, line in enumerate(lines) if line[:1] in {"+", "-"})
            assert leading <= 3


# A fork


@dataclass(frozen=True)
class Fork:
    """A repository with SGLang as released, and the series on it."""

    tree: Path

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=Fork", "-c", "user.email=fork@example.com", "-c", "core.autocrlf=false")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=self.tree, check=True, capture_output=True, text=True
        ).stdout

    def at(self, number: int) -> Path:
        """The tree after so many patches."""
        self.git("checkout", "--quiet", "--force", f"main~{len(SERIES) - number}")
        return self.tree


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Fork:
    fork = Fork(tmp_path_factory.mktemp("fork"))
    shutil.copytree(sglang_directory(), fork.tree / "sglang", ignore=shutil.ignore_patterns("__pycache__"))
    (fork.tree / ".gitignore").write_text("__pycache__/\n")
    fork.git("init", "--quiet", "--initial-branch=main")
    fork.git("add", "--all")
    fork.git("commit", "--quiet", "--message", "SGLang 0.5.12")
    fork.git("am", "--quiet", *(str(COMMITTED / name) for name in names()))
    return fork


def test_git_am_takes_the_series_and_the_log_tells_it(fork: Fork) -> None:
    subjects = fork.git("log", "--format=%s", "--reverse", "main").splitlines()
    assert subjects == ["SGLang 0.5.12", *(commit.subject for commit in SERIES)]


def test_the_last_tree_is_the_one_that_apply_makes(fork: Fork, tmp_path: Path) -> None:
    shutil.copytree(sglang_directory(), tmp_path / "sglang", ignore=shutil.ignore_patterns("__pycache__"))
    command = [str(Path(sys.executable).with_name("sglang-warmstart")), "patches", "apply", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    fork.at(len(SERIES))
    done = subprocess.run(
        ["diff", "--recursive", "--brief", "--exclude=__pycache__", fork.tree / "sglang", tmp_path / "sglang"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_with_the_package_below_python_it_is_taken_too(fork: Fork, tmp_path: Path) -> None:
    repository = Fork(tmp_path)
    pristine = fork.at(0)
    touched = [
        path
        for path in fork.git("diff", "--name-only", f"main~{len(SERIES)}", "main").split()
        if (pristine / path).exists()
    ]
    assert touched
    for path in touched:
        (tmp_path / "python" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine / path, tmp_path / "python" / path)
    repository.git("init", "--quiet", "--initial-branch=main")
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--message", "as released")
    repository.git("am", "--quiet", "--directory=python", *(str(COMMITTED / name) for name in names()))
    made = {path: (tmp_path / "python" / path).read_bytes() for path in touched}
    fork.at(len(SERIES))
    assert made == {path: (fork.tree / path).read_bytes() for path in touched}


def test_only_the_last_patch_knows_the_package_and_none_adds_a_file(fork: Fork) -> None:
    """Each patch edits SGLang's own files, and every tree but the last needs nothing that is not SGLang's."""
    assert fork.git("diff", "--diff-filter=AD", "--name-only", f"main~{len(SERIES)}", "main") == ""
    for number, path in enumerate(SERIES, 1):
        assert ("sglang_warmstart" in path.read_text(encoding="utf-8")) is (number == len(SERIES)), path


# Beside the plugin


def beside_the_plugin(tree: Path) -> dict[str, str]:
    """The environment of a process that imports SGLang from a tree, in one that has the plugin."""
    environment = child_environment(dict.fromkeys(os.environ.keys() & {"SGLANG_WARMSTART", "SGLANG_PLUGINS"}))
    return {**environment, "PYTHONPATH": f"{tree}{os.pathsep}{environment['PYTHONPATH']}"}


@pytest.mark.parametrize("number", [1, 2, 4, 5, len(SERIES)])
def test_the_plugin_leaves_alone_what_a_tree_has_and_adds_the_rest(number: int, fork: Fork) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("sglang-warmstart"), "doctor", "--json"],
        env=beside_the_plugin(fork.at(number)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    states = {each["name"]: each["state"] for each in json.loads(done.stdout)["features"]}
    found = {name: "built in" if number >= patch else "active" for name, patch in FEATURES.items()}
    # Which no patch has.
    assert states == {**found, **dict.fromkeys(("bundle-restore", "jit-monitor", "start-up-events"), "active")}


def test_a_patched_server_with_the_plugin_says_so_and_answers_as_ever(fork: Fork, tiny_model: Path) -> None:
    tree, prompt = fork.at(len(SERIES)), [5, 6, 7, 8]
    with Server(tiny_model, "--disable-attn-tp-gather", environment=beside_the_plugin(tree)) as server:
        with_both = server.generate(prompt, 8)
    with Server(tiny_model, environment={"SGLANG_WARMSTART": "0"}) as pristine:
        assert with_both == pristine.generate(prompt, 8)
    said = [line for line in server.log.splitlines() if "on SGLang 0.5.12: " in line]
    assert len(said) == 2, "in the main process, and in the scheduler"
    for line in said:
        built_in = ", ".join(sorted(FEATURES, key=line.index))
        assert line.endswith(
            f"on SGLang 0.5.12: active: bundle-restore, jit-monitor, start-up-events; built in: {built_in}"
        )
