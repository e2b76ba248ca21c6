"""One progress bar for all the kernels of a node."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm


class Progress:
    """Kernels done of those wanted, those in flight, and an estimate of what is left.

    The bar comes with the first kernel, and stays for those that come later, until there is a rest.

    Args:
        workers: compilers that run at once, at the most.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._bar: tqdm[NoReturn] | None = None
        self._wanted = self._done = self._given = self._ended = 0

    def planned(self) -> None:
        """A kernel is wanted that was not before."""
        self._wanted += 1
        if self._bar is None:
            # In a log that is no terminal, a line now and then is enough.
            interval = 0.1 if sys.stderr.isatty() else 5.0
            self._bar = tqdm(
                total=0,
                desc="warmstart: DeepGEMM kernels",
                unit="kernel",
                mininterval=interval,
                miniters=0,  # by time alone: kernels take seconds, and some come all at once from another process
                dynamic_ncols=True,
            )
        self._bar.total = self._wanted

    def started(self) -> None:
        """A compiler has been given a kernel."""
        self._given += 1
        self._show(0)

    def ended(self) -> None:
        """A compiler has ended."""
        self._ended += 1

    def finished(self) -> None:
        """A kernel is done, one way or another."""
        self._done += 1
        # The place of one that has just ended counts as taken: the next kernel takes it before anybody reads this.
        self._show(1)
        self._given -= self._ended
        self._ended = 0

    def rest(self) -> None:
        """Nobody waits for kernels any more: if all are done, the bar goes."""
        if self._bar is not None and self._done == self._wanted:
            self._bar.close()
            self._bar = None
            self._wanted = self._done = 0

    def _show(self, more: int) -> None:
        if self._bar is not None:
            in_flight = min(self._given, self._workers, self._wanted - self._done)
            self._bar.set_postfix_str(f"{in_flight} in flight", refresh=False)
            self._bar.update(more)
