"""Patch 1: the environment variables of all that follows, beside their neighbours."""

from __future__ import annotations

from sglang_warmstart.base.switches import COMPILER, PP_PARALLEL, STRICT, WARMSTART

from wiring.commit import Commit
from wiring.edits import after

_BOOLEANS = "".join(
    f"    {switch.name} = EnvBool({switch.default})\n" for switch in (PP_PARALLEL, WARMSTART, STRICT)
)

SWITCHES = Commit(
    subject="environ: switches of the warm-up of JIT kernels",
    why=f"""
        The patches of this series take the compilation of DeepGEMM's kernels out of serving, and most of it out of the
        start of a server. This one declares their environment variables, so that each of the others can be read by
        itself. {PP_PARALLEL.name}: {PP_PARALLEL.meaning}. {WARMSTART.name}: 0 turns off all warm-up that this series
        adds, whatever else is set. {STRICT.name}: {STRICT.meaning}. {COMPILER.name}: {COMPILER.meaning}.
    """,
    off="nothing changes; nothing reads these yet.",
    tested="their defaults, words, warnings, set(), override() are those of their neighbours.",
    changes={
        "sglang/srt/environ.py": [
            after(
                "    SGLANG_DEEPGEMM_SANITY_CHECK = EnvBool(False)\n",
                f'{_BOOLEANS}    {COMPILER.name} = EnvStr("{COMPILER.default}")\n',
            )
        ]
    },
)
