"""What differs between the releases of SGLang: an object for each family of them.

A feature asks the seam of the installed release where SGLang keeps something, and never asks for a version. The newest
seam whose places are all there is taken, so a release that nobody has seen yet gets that of the newest one. Where
something of it is missing after all, the feature that needs it says so by name.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from sglang_warmstart.sglang.seams.seam import Seam
from sglang_warmstart.sglang.seams.v0_5_12 import Seam0512
from sglang_warmstart.sglang.seams.v0_5_13 import Seam0513
from sglang_warmstart.sglang.seams.v0_5_14 import Seam0514
from sglang_warmstart.sglang.seams.v0_5_19 import Seam0519

# From new to old. The oldest fits everywhere.
SEAMS: tuple[Seam, ...] = (Seam0519(), Seam0514(), Seam0513(), Seam0512())


def seam() -> Seam:
    """The seam of the SGLang that this process has imported, or would import. Nothing is imported for it."""
    found = importlib.util.find_spec("sglang")
    places = found.submodule_search_locations if found is not None else None
    return seam_of(Path(next(iter(places)))) if places else SEAMS[0]


@functools.cache
def seam_of(sglang_root: Path) -> Seam:
    """The newest seam whose places are all there.

    Args:
        sglang_root: the directory of the package ``sglang``.
    """
    return next((each for each in SEAMS if each.fits(sglang_root)), SEAMS[-1])
