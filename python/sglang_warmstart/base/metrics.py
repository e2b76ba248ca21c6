"""Prometheus metrics, counted from events and shown in SGLang's own ``/metrics``.

SGLang collects the counters of all its processes through files (``PROMETHEUS_MULTIPROC_DIR``, set before they start).
Every process of ours that finds this variable counts there too, including the node's service.
"""

from __future__ import annotations

from prometheus_client import Counter

from sglang_warmstart.base.events import Event

PREFIX = "sglang_warmstart"

# name -> what it counts; the docs have the same table
METRICS = {
    "compiles": "Kernels compiled, by library and phase (startup, serving); phase serving is what must not happen.",
    "compile_seconds": "Seconds that those compiles took, each by itself.",
    "cache_hits": "Kernels that were wanted and found in the library's cache on disk, by library.",
    "kernels_planned": "DeepGEMM kernels that exact warm-up wanted.",
    "kernels_compiled": "DeepGEMM kernels that exact warm-up compiled.",
    "kernels_loaded": "Calls that loaded DeepGEMM kernels into ranks before the first request.",
    "kernels_restored": "DeepGEMM kernels restored into the cache out of a bundle.",
}
_BY_LIBRARY = {"cache_hits": ("library",), "compiles": ("library", "phase"), "compile_seconds": ("library", "phase")}


class Listener:
    """Counts the events of a process."""

    def __init__(self) -> None:
        self._counters = {
            name: Counter(f"{PREFIX}_{name}", what, _BY_LIBRARY.get(name, ())) for name, what in METRICS.items()
        }

        self._planned: set[str] = set()
        self._done: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Count what an event says. It raises nothing that is not a mistake here."""
        counters, library = self._counters, event.library
        if event.kind == "compile":
            # The stub is no kernel of a target; and one that two targets need is wanted, compiled or found once.
            if event.lane == "stub" or event.name in self._done:
                return
            if event.name not in self._planned:
                counters["kernels_planned"].inc()
                self._planned.add(event.name)
            if not event.error:
                self._done.add(event.name)
        if event.kind in ("jit", "compile") and not event.cached and not event.error:
            counters["compiles"].labels(library, event.phase).inc(event.kernels)
            # A target of exact warm-up that is met late is about no kernel: those that it needs have their own events.
            counters["compile_seconds"].labels(library, event.phase).inc(event.seconds if event.kernels else 0)
        if event.cached:
            counters["cache_hits"].labels(library).inc(event.kernels)
        if event.kind == "compile" and not event.cached and not event.error:
            counters["kernels_compiled"].inc()
        # What a library finds in its own cache is a load too, but one that is cached.
        if event.kind == "load" and not event.cached:
            counters["kernels_loaded"].inc(event.kernels)
        if event.kind == "restore" and not event.cached:
            counters["kernels_restored"].inc(event.kernels)
