"""Patch 2: the fast list of Ms keeps to its cap, and a failing warm-up does no harm."""

from __future__ import annotations

from sglang_warmstart.base.source_edit import Edit

from wiring.commit import Commit
from wiring.edits import Cut, Within, after
from wiring.places import IN_SGLANG, placed_path

COMPILE_UTILS = "sglang/srt/layers/deep_gemm_wrapper/compile_utils.py"
ENTRYPOINT = "sglang/srt/layers/deep_gemm_wrapper/entrypoint.py"
COMPILE_ONE = "_compile_deep_gemm_one_type_all"
# The last of the module's imports.
IMPORTS = "from sglang.srt.utils import ceil_div, get_available_gpu_memory, is_musa\n"

_LATE_LIST = """\
    size = server_args.chunked_prefill_size
    fast = envs.SGLANG_JIT_DEEPGEMM_FAST_WARMUP.get()
    _BUILTIN_M_LIST = fast_m_list(size) if fast else list(full_m_list(size))
"""
_MODE_RESTORED = """\
        try:
            # TODO can use multi thread
            for m in tqdm(m_list, desc=f"DeepGEMM warmup"):
                executor.execute(m=m)
        except TypeError as error:
            skip_refused_target(error, kernel_type, n, k, num_groups)
        finally:
            if has_compile_mode_api:
                deep_gemm.set_compile_mode(old_compile_mode)
"""

FAST_LIST = Commit(
    subject="deep_gemm: the fast list of Ms keeps to its cap",
    why="""
        SGLANG_JIT_DEEPGEMM_FAST_WARMUP keeps rank 0 short enough for the others not to time out in NCCL. Its list runs
        past the largest prefill where that is no power of two (a chunk of 5000 gives Ms up to 8184), and the switch is
        read when the module is imported, before a launcher may have set it. Now the list ends at max(1024,
        max_prefill_bs), and is made where the server's arguments are known.

        A warm-up that raises leaves DeepGEMM in the warm-up's compile mode: it is restored. A TypeError (a DeepGEMM
        that does not take the arguments, seen on B300 with FP4 experts) took the server down: that target is skipped
        with one line that names it, unless SGLANG_WARMSTART_STRICT is set. The sanity check of inputs does nothing
        where DeepGEMM's JIT is disabled.

        Note: an M that the list skips may still compile on first use.
    """,
    off="""
        without SGLANG_JIT_DEEPGEMM_FAST_WARMUP the list of Ms is the same as before, for every chunked prefill size.
        The other three are always on; they show only where a warm-up raises, or a sanity check had nothing to check.
    """,
    tested="""
        both lists against their definition over all sizes; compile mode, refusals and sanity check on this module with
        a stand-in for the library.
    """,
    features=("fast-warmup",),
    upstream="#18111, #23756",
    modules=(
        "shapes/__init__.py",
        "shapes/m_list.py",
        "rank/__init__.py",
        "rank/log.py",
        "rank/refused_target.py",
    ),
    files={
        placed_path("__init__.py"): '"""Warm-up of JIT kernels: at the start of a server, and not while it serves."""\n'
    },
    changes={
        COMPILE_UTILS: [
            after(
                IMPORTS,
                f"from {IN_SGLANG}.rank.refused_target import skip_refused_target\n"
                f"from {IN_SGLANG}.shapes.m_list import fast_m_list, full_m_list\n",
            ),
            Edit("_FAST_WARMUP = envs.SGLANG_JIT_DEEPGEMM_FAST_WARMUP.get()\n", ""),
            Within(
                "update_deep_gemm_config",
                [
                    Cut(
                        "    _BUILTIN_M_LIST = []\n",
                        "        _BUILTIN_M_LIST += list(range(1, m_max + 1))\n",
                        _LATE_LIST,
                    )
                ],
            ),
            Within(
                COMPILE_ONE,
                [
                    Cut("        # TODO can use multi", "set_compile_mode(old_compile_mode)\n", _MODE_RESTORED),
                ],
            ),
        ],
        ENTRYPOINT: [
            Within(
                "_sanity_check_input",
                [Edit("    if not _SANITY_CHECK:\n", "    if not _SANITY_CHECK or not ENABLE_JIT_DEEPGEMM:\n")],
            )
        ],
    },
)
