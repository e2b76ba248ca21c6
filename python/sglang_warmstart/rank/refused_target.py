"""What becomes of a target whose warm-up the installed DeepGEMM refuses."""

from __future__ import annotations

import logging
from typing import Any

from sglang_warmstart.rank.log import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)


def skip_refused_target(error: TypeError, kernel_type: Any, n: int, k: int, num_groups: int) -> None:
    """Say in one line that the target is skipped, and why.

    A DeepGEMM that does not know the arguments of a warm-up call (seen on B300 with FP4 experts) raises a TypeError.
    The server can serve: the kernels of that target compile when they are first called.

    Raises:
        TypeError: ``error`` itself, in strict mode.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_WARMSTART_STRICT.get():
        raise error
    logger.warning(
        "warmstart: the installed DeepGEMM refuses the warm-up of <%s> N=%d K=%d num_groups=%d and it is skipped: %s",
        getattr(kernel_type, "name", kernel_type),
        n,
        k,
        num_groups,
        str(error).splitlines()[0] if str(error) else "TypeError",
    )
