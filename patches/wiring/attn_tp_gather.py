"""Patch 3: --disable-attn-tp-gather."""

from __future__ import annotations

from sglang_warmstart.sglang.attn_tp_gather import FIELD, FLAG, HELP

from wiring.commit import Commit
from wiring.edits import Within, after, before
from wiring.numbers import host_of, result, run_of

_CHECK = f"""\
        if not isinstance(self.{FIELD}, bool):
            raise TypeError(
                "{FIELD} ({FLAG}) must be True or False, "
                f"got {{type(self.{FIELD}).__name__}} "
                f"{{self.{FIELD}!r}}"
            )

"""
_ARGUMENT = f"""\
        parser.add_argument(
            "{FLAG}",
            action="store_true",
            help="{HELP}",
        )
"""


def _planned(name: str) -> str:
    (event, *_) = next(iter(run_of(result("gather"), name)["planned"].values()))
    return ", ".join(map(str, event["batch_sizes"]))


ATTN_TP_GATHER = Commit(
    subject=f"server_args: {FLAG}",
    why="""
        A model that gathers its sequence-parallel input in attention by itself still has its token counts padded to
        attn_tp_size by the scheduler and by the graph runner, so autotuners choose kernels for the wrong size. With the
        flag require_attn_tp_gather() answers no before any other check, and with it require_gathered_buffer() and
        require_mlp_sync() as far as they depend on it: no gathered buffer at graph capture, no padding, no all-gather
        in the scheduler.

        On a model that needs the gather, results are wrong; the help text says so.
    """,
    off="the flag is off by default, and every answer is the one before.",
    tested=f"""
        the answers over a grid of parallel settings, with and without; constructor, repr, pickling, config file,
        command line. As a plugin, on {host_of(result("gather"))}, TP 2: CUDA graphs planned for batches of
        {_planned("gather-flag")} instead of {_planned("gather-stock")}.
    """,
    features=("attn-tp-gather",),
    upstream="#26047",
    changes={
        "sglang/srt/server_args.py": [
            after(
                "    msprobe_dump_config: Optional[str] = None\n",
                f"\n    # For models that gather attention's input themselves\n    {FIELD}: bool = False\n",
            ),
            Within("ServerArgs.__post_init__", [before("        self._maybe_download_model_for_runai()\n", _CHECK)]),
            before('        parser.add_argument(\n            "--enable-two-batch-overlap",\n', _ARGUMENT),
        ],
        "sglang/srt/utils/common.py": [
            Within(
                "require_attn_tp_gather",
                [
                    before(
                        "    from sglang.srt.layers.moe.utils import get_moe_a2a_backend\n",
                        f"    if server_args.{FIELD}:\n        return False\n\n",
                    )
                ],
            )
        ],
    },
)
