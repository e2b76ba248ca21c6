"""The process that restores a bundle while a server starts (:mod:`.start` starts it).

If anything goes wrong with the bundle, one line gives the reason, and the server starts without it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sglang_warmstart.base.events import open_log, timed
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.base.switches import BUNDLE
from sglang_warmstart.bundle import source
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.places import place_of
from sglang_warmstart.bundle.restore import restore
from sglang_warmstart.bundle.signature import PublicKey

# A store that does not answer is not waited for. Below the time that the ranks wait for this process.
LIMIT_S = 120.0

logger = logging.getLogger("sglang.warmstart.bundle")


def run(bundle: str, key: str | None, cache: Path, environment: Mapping[str, str]) -> int:
    """Restore a bundle, and say what came of it in one line. Returns the exit status."""
    name = source.shown(bundle)
    try:
        # An empty one is one that somebody meant to set.
        public_key = PublicKey.load(Path(key)) if key is not None else None
        place = place_of(environment, cache, None)
        with timed("restore", name, library="deep-gemm", kernels=0) as details, source.opened(bundle) as stream:
            restored = restore(stream, place, public_key)
            details["kernels"] = restored.kernels
    except BundleError as error:
        # An error of the source names it already.
        where = "" if str(error).startswith(name) else f"{name}: "
        logger.warning("the bundle is not restored: %s%s", where, error)
        return 1
    except Exception as error:
        # It is a help for the server, and not to be in its way.
        logger.warning("the bundle is not restored: %s: %s: %s", name, type(error).__name__, error)
        return 1
    for note in restored.notes:
        logger.warning("%s: %s", name, note)
    logger.info("%s: %s", name, restored.in_words())
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process. Which bundle it is, the environment says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="of this process alone; removed at the end")
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    parser.add_argument("--key")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="[%(asctime)s] warmstart bundle: %(message)s", level=logging.INFO)
    bundle = os.environ[BUNDLE.name]
    open_log("restore", os.environ)

    def at_end() -> None:
        if os.getppid() == options.parent:
            logger.warning("the bundle is not restored: %s: it takes more than %g s", source.shown(bundle), LIMIT_S)
        # What is published is whole, and the rest goes with the directory.
        shutil.rmtree(options.directory, ignore_errors=True)

    end_with(options.parent, at_end, LIMIT_S)
    status = run(bundle, options.key, options.cache, os.environ)
    shutil.rmtree(options.directory, ignore_errors=True)
    # Not to wait for threads of a store that hang.
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
