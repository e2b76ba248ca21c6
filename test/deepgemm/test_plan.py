"""A plan says the same wherever it was recorded, and gives kernels the names that DeepGEMM gives them anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.recorded import recording
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.plan import LeftOut, Plan, PlanError, Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target

LAUNCH = {"config": "deepseek", "rank": "0"}


def identity(place: str = recording().installed_in, /, **changed: Any) -> Identity:
    known = Identity(
        gpu="NVIDIA H200",
        num_sms=132,
        capability=(9, 0),
        deep_gemm="0123",
        installed_in=place,
        compiler=recording().compiler,
        kind="nvcc",
        settings={},
    )
    return msgspec.structs.replace(known, **changed)


def everything(include: Path) -> list[tuple[Target, list[RecordedKernel]]]:
    """All that was recorded, as it would have been with DeepGEMM's headers there."""
    return [
        (each.target, [recording().relocated(use.directory, include, use.m) for use in each.kernels])
        for each in recording().targets
    ]


def plan_of(deep_gemm: str = recording().installed_in) -> Plan:
    planner = Planner(identity(deep_gemm), "sgl-deep-gemm 0.1.0", "4567")
    planner.add(identity(deep_gemm), LAUNCH, everything(Path(deep_gemm, "include")))
    return planner.plan()


def test_a_plan_does_not_depend_on_where_deep_gemm_was() -> None:
    here, there = plan_of("/opt/venv/lib/python3.12/site-packages/deep_gemm"), plan_of("/usr/lib/python3/deep_gemm")
    assert plans.encode(here) == plans.encode(there)
    assert b"/opt/venv" not in plans.encode(here)


def test_its_kernels_get_the_names_that_deep_gemm_itself_gave_them() -> None:
    # The recording has them from DeepGEMM on a GPU.
    plan, include = plan_of("/somewhere/else/deep_gemm"), Path(recording().installed_in, "include")
    directories = plan.directories(include)
    (launch,) = plan.launches
    found = {each.target: each.kernels for each in plan.targets_of(launch, include, directories)}
    assert found == {each.target: each.kernels for each in recording().targets}
    used = {use.directory for each in recording().targets for use in each.kernels}
    assert set(directories.values()) == used
    for name, directory in directories.items():
        assert plan.kernels[name].source == recording().kernels[directory].source
        assert plan.flags_of(name, include) == recording().kernels[directory].flags_for(include)


def test_a_launch_becomes_the_identity_of_the_place_where_it_is_restored() -> None:
    plan = plan_of("/opt/venv/deep_gemm")
    assert plan.identity_of(plan.launches[0], Path("/usr/lib/deep_gemm"), plan.compiler) == identity(
        "/usr/lib/deep_gemm"
    )


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = plan_of()
    assert plans.decode(plans.encode(plan)) == plan


@given(st.binary(max_size=300))
def test_what_is_no_plan_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(PlanError) as caught:
        plans.decode(data)
    assert "\n" not in str(caught.value)


def one_kernel(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(plan["kernels"].values()))
    return found


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: plan.update(format=2), "a plan of format 2, this version reads format 1"),
        (lambda plan: plan.pop("compiler"), "missing required field `compiler`"),
        (lambda plan: one_kernel(plan).update(source="int x;"), "are not those that it was named for"),
        (lambda plan: one_kernel(plan).update(flags=7), "there is no line 7 of flags"),
        (lambda plan: one_kernel(plan).update(flags=-1), "there is no line -1 of flags"),
        (lambda plan: plan["flags"].__setitem__(0, "-O0"), "are not those that it was named for"),
        (lambda plan: plan["kernels"].popitem(), "which is not in the plan"),
        (lambda plan: plan["kernels"].update(evil=one_kernel(plan)), "not a kernel's directory: 'evil'"),
        (lambda plan: plan["kernels"].update({"kernel." + "x" * 300: one_kernel(plan)}), "too long"),
        (lambda plan: plan.update(compiler="gcc"), "no release in what the compiler prints"),
    ],
    ids=["format", "field", "source", "flags", "negative", "line", "gone", "name", "long", "compiler"],
)
def test_a_plan_that_does_not_hold_together_is_refused(damage: Callable[[dict[str, Any]], object], reason: str) -> None:
    plan = msgspec.json.decode(plans.encode(plan_of()))
    damage(plan)
    with pytest.raises(PlanError, match=reason):
        plans.decode(msgspec.json.encode(plan))


def half(number: int, **changed: Any) -> Plan:
    """A plan of every second target, and of a rank of its own."""
    deep_gemm = f"/opt/{number}/deep_gemm"
    planner = Planner(identity(deep_gemm, **changed), "sgl-deep-gemm 0.1.0", "4567")
    targets = everything(Path(deep_gemm, "include"))[number::2]
    planner.add(identity(deep_gemm, **changed), {**LAUNCH, "rank": str(number)}, targets)
    planner.leave_out(f"target {number}", "no reason")
    return planner.plan()


def test_plans_of_several_ranks_become_one() -> None:
    both = plans.merged({"a": half(0), "b": half(1)})
    plans.check(both)
    assert both.kernels == plan_of().kernels
    assert [launch.launch["rank"] for launch in both.launches] == ["0", "1"]
    assert both.left_out == (LeftOut("target 0", "no reason"), LeftOut("target 1", "no reason"))
    assert plans.merged({"a": both, "b": half(0)}) == both


def test_what_one_plan_has_of_a_rank_and_what_another_has_become_all_that_is_known_of_it() -> None:
    planners = [Planner(identity(), "sgl-deep-gemm 0.1.0", "4567") for _ in range(2)]
    targets = everything(Path(recording().installed_in, "include"))
    planners[0].add(identity(), LAUNCH, targets[:5])
    planners[0].leave_out(str(targets[7][0]), "no reason")
    planners[1].add(identity(), LAUNCH, targets[3:])
    for order in (planners, planners[::-1]):
        both = plans.merged({str(number): planner.plan() for number, planner in enumerate(order)})
        (launch,) = both.launches
        assert [each.target for each in launch.targets] == sorted(target for target, _ in targets)
        assert both.left_out == ()


def test_plans_with_flags_of_their_own_keep_them() -> None:
    planner = Planner(identity(), "sgl-deep-gemm 0.1.0", "4567")
    targets = [
        (target, [msgspec.structs.replace(kernel, flags=f"{kernel.flags} -lineinfo") for kernel in kernels])
        for target, kernels in everything(Path(recording().installed_in, "include"))[1::2]
    ]
    planner.add(identity(), {**LAUNCH, "rank": "1"}, targets)
    both = plans.merged({"a": half(0), "b": planner.plan()})
    plans.check(both)
    assert len(both.flags) == 2
    assert {both.flags[kernel.flags].endswith("-lineinfo") for kernel in both.kernels.values()} == {True, False}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"deep_gemm": "89ab"}, "build"),
        ({"compiler": recording().compiler.replace("13.0", "13.1")}, "compiler"),
        ({"kind": "nvrtc"}, "kind"),
    ],
)
def test_plans_of_different_tools_do_not_become_one(changed: dict[str, str], what: str) -> None:
    with pytest.raises(
        PlanError, match=f"a.json and b.json are not of the same {what}: .* and .*: compile them one by"
    ):
        plans.merged({"a.json": half(0), "b.json": half(1, **changed)})
