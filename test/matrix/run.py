"""Runs the tests that depend on the release of SGLang, on the one that is first on the Python path: `make test-matrix`.

With `--record` it keeps what `doctor` says there and how many tests passed, in VERSION.json beside this file, and makes
the tables of docs/compatibility.md anew. Without it, test_compatibility.py compares the two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

TEST = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TEST))

TESTS = (
    "test_server.py",
    "test_plugin.py",
    "sglang",
    "sglang/matrix",
    "test_compatibility.py::test_what_is_recorded_is_what_doctor_says_on_this_release",
)
# They say the same on every release.
LEFT_TO_MAKE_TEST = (
    "test_announce.py",
    "test_dataclass_field.py",
    "test_mhc_at_once.py",
    "test_shapes.py",
    "test_votes.py",
)


def doctor() -> dict[str, Any]:
    """What the command says as an operator runs it."""
    from kit.environment import child_environment

    command = [str(Path(sysconfig.get_path("scripts"), "sglang-warmstart")), "doctor", "--json"]
    done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True, timeout=300)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def outcomes(report: Path) -> dict[str, dict[str, int]]:
    """Passed, failed and skipped by file, from a report of pytest."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [each.tag for each in case if each.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}[kinds[0]] if kinds else "passed"
        # A class has a name of its own; a module that cannot be imported has none.
        name = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), "(none)")
        counts.setdefault(name, Counter())[outcome] += 1
    return {name: dict(sorted(each.items())) for name, each in sorted(counts.items())}


def main() -> int:
    """Run, record if that is wished, and return the status of pytest."""
    from kit import compatibility
    from kit.release import installed_release
    from kit.wheels import pinned_deep_gemm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="for pytest, after --")
    wished = parser.parse_args()
    release, found = installed_release().version, doctor()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        options = [*(option for option in wished.options if option != "--"), f"--junitxml={report}", "-q"]
        options += [f"--ignore={TEST / 'sglang' / name}" for name in LEFT_TO_MAKE_TEST]
        features = {each["name"]: [each["state"], each["detail"]] for each in found["features"]}
        if wished.record:
            # The tests compare with it.
            compatibility.record(release, pinned_deep_gemm(), features, {})
        tests = [str(TEST / each) for each in TESTS]
        status = subprocess.run([sys.executable, "-m", "pytest", *tests, *options], cwd=TEST.parent).returncode
        if wished.record and report.is_file():
            compatibility.record(release, pinned_deep_gemm(), features, outcomes(report))
    for problem in found["problems"]:
        print(f"doctor on {release}: {problem}", file=sys.stderr)
    return status or bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
