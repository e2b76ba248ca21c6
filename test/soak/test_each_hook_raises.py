"""Each hook of the plugin raises in turn, in a server of its own, which starts and answers as without the plugin."""

from __future__ import annotations

from pathlib import Path

from kit.environment import python_path
from kit.server import Server

SABOTEUR = Path(__file__).parents[1] / "kit" / "saboteur"
PROMPT = [5, 6, 7, 8]


def answer(model: Path, **environment: str) -> tuple[list[int], str]:
    with Server(model, environment=environment) as server:
        return server.generate(PROMPT, max_new_tokens=8), server.log


def test_each_hook_raises_in_turn(tiny_model: Path, tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    path = {"PYTHONPATH": python_path(SABOTEUR), "SABOTAGED": str(reached)}
    expected, _ = answer(tiny_model, SGLANG_WARMSTART="0")
    assert answer(tiny_model, SABOTAGE="all", **path)[0] == expected
    for hook in sorted(set(reached.read_text().splitlines())):
        tokens, log = answer(tiny_model, SABOTAGE=hook, **path)
        assert tokens == expected, hook
        assert f"warmstart: {hook} failed, SGLang goes on without it: RuntimeError: sabotaged" in log, hook
