"""The series for SGLang 0.5.23 as a reviewer meets it: its tests, run as SGLang runs them, and its numbers."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from kit.environment import NO_PLUGIN, child_environment, python_path
from making import git, module_of
from series import SERIES, Fork

pytestmark = pytest.mark.release("0.5.23")

TESTS = Path("test/registered/unit/layers/deep_gemm_wrapper")
COMPILE_UTILS = Path("sglang/srt/layers/deep_gemm_wrapper/compile_utils.py")
STANDINS = Path(__file__).parents[1] / "kit" / "standins" / "upstream_tests"


def message_of(number: int) -> str:
    """What a patch says, as one line where it is prose."""
    text = email.message_from_bytes(SERIES[number - 1].read_bytes()).get_payload()
    assert isinstance(text, str)
    return text.partition("\n---\n")[0]


def failing(fork: Fork, report: Path) -> dict[str, set[str]]:
    """Run all tests of the series on the tree as it is. For each file, what fails or cannot be loaded."""
    environment = child_environment(
        # SGLang's test helpers read the first digit of CUDA_VISIBLE_DEVICES.
        {**NO_PLUGIN, "CUDA_VISIBLE_DEVICES": None, "PYTHONPATH": python_path(fork.holder, STANDINS)}
    )
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={fork.tree}"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(TESTS)]
    done = subprocess.run(command, cwd=fork.tree, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, set[str]] = {path.stem: set() for path in (fork.tree / TESTS).glob("*.py")}
    for case in ElementTree.parse(report).iter("testcase"):
        place = f"{case.get('classname')}.{case.get('name')}"
        (file,) = (name for name in found if name in place)
        if case.find("failure") is not None or case.find("error") is not None:
            found[file].add(place)
    return found


def test_the_tests_of_the_series_pass_with_it_and_not_without_it(fork: Fork, tmp_path: Path) -> None:
    fork.at(len(SERIES))
    with_it = failing(fork, tmp_path / "with.xml")
    assert with_it == {"test_warmup_m_list": set(), "test_warmup_failure": set(), "test_warmup_provider": set()}
    git(fork.tree, "checkout", "--quiet", "base", "--", "python")
    without = failing(fork, tmp_path / "without.xml")
    assert set(without) == set(with_it)
    assert all(without.values()), without
    # As the second message says.
    assert len(without["test_warmup_failure"]) == 3


def test_each_patch_has_its_test(fork: Fork) -> None:
    for number in range(1, len(SERIES) + 1):
        fork.at(number)
        assert len(list((fork.tree / TESTS).glob("*.py"))) == number


ROW = re.compile(r"^ +(-?\d+) +(\d+) +(\d+) +([\d.]+) +(\d+) +(\d+) +([\d.]+)$", re.MULTILINE)


def row(compile_utils: Any) -> tuple[str, str, str]:
    """Of the list of Ms: its length, its largest M, and the memory of its warm-up."""
    m_list = compile_utils._BUILTIN_M_LIST
    memory = compile_utils._BaseWarmupExecutor.get_memory_requirement(
        compile_utils.DeepGemmKernelType.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        max_m=m_list[-1],
        n=4096,
        k=7168,
        num_groups=32,
    )
    return str(len(m_list)), str(m_list[-1]), f"{memory:.2f}"


def test_the_first_message_has_the_numbers_of_the_modules(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.runtime_context import get_context

    monkeypatch.setenv("SGLANG_JIT_DEEPGEMM_FAST_WARMUP", "1")
    before = module_of(fork.at(0) / COMPILE_UTILS, "compile_utils_before")
    after = module_of(fork.at(1) / COMPILE_UTILS, "compile_utils_after")
    rows = ROW.findall(message_of(1))
    assert len(rows) == 8
    for chunk, *numbers in rows:
        with get_context().override_server_args(chunked_prefill_size=int(chunk)):
            for module in (before, after):
                module.update_deep_gemm_config(0)
        assert (*row(before), *row(after)) == tuple(numbers)


def test_the_last_message_has_the_measured_cost_of_a_call() -> None:
    measured = json.loads(Path(__file__).with_name("hook_cost.json").read_text(encoding="utf-8"))
    message = " ".join(message_of(3).split())
    for name in ("stock", "patched", "patched, with a provider"):
        assert f"{measured['median_ns'][name]} ns" in message
    for name in ("stock, once more", "patched"):
        for ratio in measured["quartiles_of_the_ratio_to_stock"][name]:
            assert f"{ratio:.3f}" in message
