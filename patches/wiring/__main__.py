"""``python -m wiring``: write patches/sglang-0.5.12 from the plugin's sources and the SGLang that is installed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from wiring.build import VERSION, build
from wiring.series import SERIES


def main() -> int:
    """Write the series. Returns the exit status."""
    found, spec = importlib.metadata.version("sglang"), importlib.util.find_spec("sglang")
    if found != VERSION or spec is None or spec.origin is None:
        print(f"wiring: needs SGLang {VERSION} as released, found {found}: make patches uses .venv", file=sys.stderr)
        return 2
    out = Path(__file__).parents[1] / f"sglang-{VERSION}"
    for old in out.glob("*.patch"):
        old.unlink()
    for path in build(SERIES, Path(spec.origin).parents[1], out):
        print(path.relative_to(out.parents[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
