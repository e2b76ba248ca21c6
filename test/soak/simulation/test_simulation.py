"""The model of a cluster keeps to what is known of list scheduling and to real runs, and the page says the same."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import cluster
import msgspec
import pytest
from cluster import forecast, makespan, overhead, plan_of, real_run, table
from hypothesis import given
from hypothesis import strategies as st

PAGE = Path(__file__).parents[3] / "docs" / "bundles.md"

tasks = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)
few_tasks = st.lists(st.integers(1, 20), min_size=1, max_size=7)
workers = st.integers(1, 60)
costs = st.floats(0, 1)


@given(tasks, workers, costs, costs)
def test_nothing_is_faster_than_the_longest_task_the_cores_or_the_scheduler(
    seconds: list[float], count: int, per_task: float, idle: float
) -> None:
    end = makespan(seconds, count, per_task, idle) * (1 + 1e-9)
    assert end >= max(seconds) + per_task + idle
    assert end >= sum(seconds) / count
    assert end >= len(seconds) * per_task + min(seconds)


@given(tasks, workers)
def test_in_any_order_it_is_within_grahams_bound(seconds: list[float], count: int) -> None:
    # R. L. Graham, 1966: the last task begins when the others cannot keep all workers busy any longer.
    assert makespan(seconds, count) <= (sum(seconds) / count + (1 - 1 / count) * max(seconds)) * (1 + 1e-9)


@given(few_tasks, st.integers(1, 3))
def test_the_largest_first_it_is_within_four_thirds_of_the_best_there_is(seconds: list[int], count: int) -> None:
    best = min(
        max(
            sum(each for each, place in zip(seconds, places, strict=True) if place == worker) for worker in range(count)
        )
        for places in itertools.product(range(count), repeat=len(seconds))
    )
    found = makespan(sorted(seconds, reverse=True), count)
    assert best <= found <= best * (4 / 3 - 1 / (3 * count)) + 1e-9
    # In any order it is within twice of it.
    assert makespan(seconds, count) <= best * (2 - 1 / count) + 1e-9


@given(tasks, costs)
def test_one_worker_does_one_after_the_other(seconds: list[float], per_task: float) -> None:
    assert makespan(seconds, 1, per_task) == pytest.approx(sum(seconds) + len(seconds) * per_task)


@given(tasks, costs, costs)
def test_with_a_worker_for_each_task_only_the_scheduler_makes_one_wait(
    seconds: list[float], per_task: float, idle: float
) -> None:
    ends = [number * per_task + idle + each for number, each in enumerate(seconds, 1)]
    assert makespan(seconds, len(seconds), per_task, idle) == pytest.approx(max(ends))


@given(tasks, workers, costs)
def test_what_the_scheduler_takes_never_helps(seconds: list[float], count: int, per_task: float) -> None:
    slowed = makespan(seconds, count, per_task) * (1 + 1e-9)
    assert slowed >= max(max(seconds), sum(seconds) / count)
    # Nor does it cost more than to do all of that one after the other.
    bound = sum(seconds) / count + max(seconds) + len(seconds) * per_task
    assert slowed <= bound * (1 + 1e-6)


def test_the_limit_is_what_makes_a_difference() -> None:
    dear = msgspec.structs.replace(overhead(), seconds_per_task=1.0)
    assert forecast(5000, 512, dear).limit == "scheduler"
    assert forecast(39, 512).limit == "longest kernel"
    assert forecast(5000, 2).limit == "cores"
    # More cores are no help where they are not the limit, and are where they are.
    assert forecast(39, 512).seconds > 0.95 * forecast(39, 64).seconds
    assert forecast(5000, 2).seconds > 1.9 * forecast(5000, 4).seconds


def test_a_plan_is_the_real_one_or_drawn_from_it() -> None:
    _, kernels = real_run()
    assert plan_of(39) == list(kernels)
    assert sum(kernel.seconds for kernel in kernels) == pytest.approx(251.4, abs=0.1)
    large = plan_of(2000)
    assert set(large) <= set(kernels)
    assert len(large) == 2000
    assert [kernel.guess for kernel in large] == sorted((kernel.guess for kernel in large), reverse=True)
    mean = sum(kernel.seconds for kernel in large) / 2000
    assert mean == pytest.approx(sum(kernel.seconds for kernel in kernels) / 39, rel=0.05)


def test_real_runs_took_what_the_model_says_of_them() -> None:
    found = cluster.errors()
    assert len(found) >= 4
    for what, (real, modelled) in found.items():
        assert modelled == pytest.approx(real, rel=0.1), what


def test_the_table_is_made_quickly_and_each_time_the_same() -> None:
    begun = time.process_time()
    first = table()
    assert time.process_time() - begun < 1
    assert table() == first
    assert len(first.splitlines()) == 2 + len(cluster.KERNELS) * len(cluster.WORKERS)


def test_the_page_has_the_table_and_the_errors_of_the_model() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text
    assert cluster.validation() in " ".join(text.split())
