"""`sglang serve`, the other way to start a server, with the plugin's flag."""

from pathlib import Path

from kit.model import write_tiny_llama
from kit.server import Server

FLAG = "--disable-attn-tp-gather"


def test_it_loads_the_plugin_takes_the_flag_and_answers_as_launch_server_does(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    tokens = []
    for launch in ("serve", "module"):
        with Server(model, FLAG, launch=launch) as server:
            tokens.append(server.generate([5, 6, 7, 8], 8))
        assert "disable_attn_tp_gather=True" in server.log
        assert "warmstart 0.1.0 on SGLang 0.5.12: active: " in server.log
    assert tokens[0] == tokens[1]
