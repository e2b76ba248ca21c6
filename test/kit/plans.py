"""Plans of the recorded kernels, for the DeepGEMM and the compiler of the toolchain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Identity, build_hash, distribution_of, headers_hash
from sglang_warmstart.deepgemm.plan import Plan, Planner

from kit.recorded import recording
from kit.toolchain import toolchain

LAUNCH = {"config": "deepseek", "tp_size": "1", "pp_size": "1", "rank": "0"}
# The masked GEMM has two kernels, the prenorm GEMM three: ten seconds of a compiler.
FEW = (("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048),)


def identity_in(deep_gemm: Path, **changed: object) -> Identity:
    """What a rank would compile with if the toolchain's DeepGEMM were in this directory."""
    return Identity(
        **{
            "gpu": recording().gpu,
            "num_sms": 132,
            "capability": (9, 0),
            "deep_gemm": build_hash(toolchain().deep_gemm),
            "installed_in": str(deep_gemm),
            "compiler": toolchain().compiler().version,
            "kind": "nvcc",
            "settings": {},
            **changed,
        }
    )  # type: ignore[arg-type]


def real_plan(
    shapes: Sequence[tuple[str, int, int]] | None = FEW, deep_gemm: Path = Path("/opt/venv/deep_gemm")
) -> Plan:
    """A plan that was recorded where DeepGEMM is in some directory.

    Args:
        shapes: kernel type, N and K of its targets; None for all that were recorded.
    """
    found = toolchain().deep_gemm
    if shapes is None:
        shapes = list(
            dict.fromkeys((each.target.kernel_type, each.target.n, each.target.k) for each in recording().targets)
        )
    identity = identity_in(deep_gemm)
    planner = Planner(identity, distribution_of(found), headers_hash(found))
    planner.add(identity, LAUNCH, [recording().of_target(*shape, deep_gemm / "include") for shape in shapes])
    return planner.plan()


def write_plan(path: Path, plan: Plan) -> Path:
    """A plan as a file."""
    path.write_bytes(plans.encode(plan))
    return path
