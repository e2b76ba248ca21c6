"""`make soak`: runs each part of test/soak to its end, and writes what came out to result.json beside this file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _tests(place: Path, *chosen: str) -> tuple[int, dict[str, int]]:
    report = place / "tests.xml"
    report.unlink(missing_ok=True)
    status = subprocess.run([sys.executable, "-m", "pytest", *chosen, f"--junitxml={report}"], cwd=ROOT).returncode
    if not report.is_file():
        return status, {}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts: Counter[str] = Counter()
    for suite in suites:
        counts.update({name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")})
    return status, dict(counts)


def _mutants(place: Path) -> tuple[int, dict[str, int]]:
    verdicts = place / "mutants.json"
    status = subprocess.run([sys.executable, str(HERE / "mutants.py"), "--result", str(verdicts)], cwd=ROOT).returncode
    return status, dict(Counter(json.loads(verdicts.read_text()).values())) if verdicts.is_file() else {}


_PARTS: dict[str, Callable[[Path], tuple[int, dict[str, int]]]] = {
    "tests": lambda place: _tests(place, "test/soak"),
    "tests marked as long": lambda place: _tests(place, "test", "-m", "long"),
    "mutants": _mutants,
}


def main() -> int:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    parts: dict[str, object] = {}
    failed = False
    with tempfile.TemporaryDirectory() as place:
        for name, part in _PARTS.items():
            start = time.monotonic()
            status, counts = part(Path(place))
            parts[name] = {"status": status, "counts": counts, "seconds": round(time.monotonic() - start)}
            failed = failed or status != 0
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {"date": date, "commit": commit.stdout.strip(), "parts": parts}
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
