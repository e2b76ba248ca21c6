"""F5: `--disable-attn-tp-gather` is an argument like SGLang's own, and turns the padding of token counts off."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib
import itertools
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kit.fork_server import ForkServer
from kit.gpu_standins import CudaRuntime
from kit.release import is_patched
from sglang.srt.managers import scheduler
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils import common

FEATURE = "attn-tp-gather"

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

pytestmark = pytest.mark.release("0.5.12")

FIELD = "disable_attn_tp_gather"
FLAG = "--disable-attn-tp-gather"


def arguments(**settings: Any) -> ServerArgs:
    """Arguments as the constructor makes them; "dummy" keeps SGLang from looking for a model."""
    return ServerArgs(model_path="dummy", **settings)


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """`prepare_server_args` configures logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def from_command_line(*words: str) -> ServerArgs:
    return prepare_server_args(["--model-path", "dummy", *words])


def test_the_constructor_takes_it_by_keyword() -> None:
    assert arguments().disable_attn_tp_gather is False
    assert arguments(disable_attn_tp_gather=True).disable_attn_tp_gather is True
    with pytest.raises(TypeError, match="disable_attn_tp_scatter"):
        arguments(disable_attn_tp_scatter=True)


def test_it_is_a_field_of_the_dataclass() -> None:
    (field,) = (field for field in dataclasses.fields(ServerArgs) if field.name == FIELD)
    assert (field.default, field.init, field.repr) == (False, True, True)
    assert dataclasses.fields(ServerArgs)[-1] is field, "arguments by position keep their places"
    assert dataclasses.asdict(arguments(disable_attn_tp_gather=True))[FIELD] is True
    assert dataclasses.replace(arguments(), disable_attn_tp_gather=True).disable_attn_tp_gather is True
    assert arguments(disable_attn_tp_gather=True, random_seed=1) != arguments(random_seed=1)


@pytest.mark.parametrize("value", [True, False])
def test_it_is_in_the_repr(value: bool) -> None:
    assert f"{FIELD}={value})" in repr(arguments(disable_attn_tp_gather=value))


def test_the_class_stays_the_class_that_others_imported() -> None:
    # Imported above, before the plugin was loaded; by the scheduler earlier still.
    assert ServerArgs is sys.modules["sglang.srt.server_args"].ServerArgs is scheduler.ServerArgs
    assert isinstance(arguments(), scheduler.ServerArgs)


@pytest.mark.parametrize("value", ["yes", "", 1, 0, None])
def test_a_value_of_another_type_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=re.escape(FLAG)):
        arguments(disable_attn_tp_gather=value)


# In a child process, which is sent the arguments as SGLang's schedulers are.
RECEIVE = """
import base64, dataclasses, pickle, sys
if sys.argv[1] == "True":
    from sglang.srt.plugins import load_plugins
    load_plugins()
received = pickle.loads(base64.b64decode(sys.argv[2]))
is_field = "disable_attn_tp_gather" in {field.name for field in dataclasses.fields(received)}
print("received", received.disable_attn_tp_gather, is_field, "disable_attn_tp_gather=True" in repr(received))
"""


@pytest.mark.parametrize("plugins", [True, False])
def test_it_reaches_a_child_process(forks: ForkServer, plugins: bool) -> None:
    sent = base64.b64encode(pickle.dumps(arguments(disable_attn_tp_gather=True))).decode()
    shown = plugins or is_patched()
    assert f"received True {shown} {shown}\n" in forks.run(RECEIVE, str(plugins), sent).checked()


@pytest.mark.usefixtures("logging_kept")
def test_the_command_line_takes_the_flag() -> None:
    assert from_command_line().disable_attn_tp_gather is False
    assert from_command_line(FLAG).disable_attn_tp_gather is True


@pytest.mark.usefixtures("logging_kept")
@pytest.mark.parametrize(("written", "value"), [("true", True), ("false", False)])
def test_a_config_file_takes_it(written: str, value: bool, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"disable-attn-tp-gather: {written}\nmax-running-requests: 3\n")
    server_args = from_command_line("--config", str(config))
    assert server_args.max_running_requests == 3
    assert server_args.disable_attn_tp_gather is value


def test_the_help_names_no_model_and_warns() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    (action,) = (action for action in parser._actions if FLAG in action.option_strings)
    assert action.dest == FIELD
    assert isinstance(action, argparse._StoreTrueAction)
    text = str(action.help)
    assert "on a model that needs the gather, results are wrong" in text
    assert not re.search(r"deepseek|qwen|llama|glm|kimi|gpt|longcat", text, re.IGNORECASE)


REQUIREMENTS = ("require_attn_tp_gather", "require_gathered_buffer", "require_mlp_sync")


def cases() -> Iterator[dict[str, Any]]:
    """Every combination of the arguments that SGLang's functions look at."""
    values: dict[str, list[Any]] = {
        "tp_size": [1, 8],
        "attention": [(False, 1), (True, 2), (True, 8)],
        "moe_dense_tp_size": [None, 1],
        "enable_dp_lm_head": [False, True],
        "a2a": ["none", "deepep"],
    }
    for case in itertools.product(*values.values()):
        settings = dict(zip(values, case, strict=True))
        settings["enable_dp_attention"], settings["dp_size"] = settings.pop("attention")
        if settings["dp_size"] <= settings["tp_size"]:
            yield settings


@pytest.fixture
def with_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerArgs]:
    """Makes arguments, and the MoE backend that SGLang derives from them."""
    from sglang.srt.layers.moe import utils

    monkeypatch.setattr(utils, "MOE_A2A_BACKEND", utils.MOE_A2A_BACKEND)

    def make(a2a: str, **settings: Any) -> ServerArgs:
        utils.MOE_A2A_BACKEND = utils.MoeA2ABackend(a2a)
        return arguments(**settings)

    return make


def is_scattered(server_args: ServerArgs, settings: dict[str, Any]) -> bool:
    """What SGLang answers without the flag."""
    if settings["a2a"] == "none" and server_args.moe_dense_tp_size is None:
        return False
    return not server_args.enable_dp_attention or server_args.dp_size < server_args.tp_size


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_by_default_the_answers_are_sglangs_own(name: str, with_settings: Callable[..., ServerArgs]) -> None:
    answers = set()
    for settings in cases():
        server_args = with_settings(**settings)
        attn_tp_gather = is_scattered(server_args, settings)
        gathered_buffer = attn_tp_gather or common.require_mlp_tp_gather(server_args)
        expected = dict(
            zip(
                REQUIREMENTS,
                (attn_tp_gather, gathered_buffer, gathered_buffer or server_args.enable_dp_attention),
                strict=True,
            )
        )
        answer = getattr(common, name)(server_args)
        assert answer == expected[name], settings
        answers.add(answer)
    assert answers == {True, False}, "the cases do not tell a function from a constant"


def test_with_the_flag_no_gather_is_required(with_settings: Callable[..., ServerArgs]) -> None:
    for settings in cases():
        server_args = with_settings(**settings, disable_attn_tp_gather=True)
        # What is left is what MLP layers across DP ranks ask for.
        mlp_tp_gather = common.require_mlp_tp_gather(server_args)
        assert common.require_attn_tp_gather(server_args) is False, settings
        assert common.require_gathered_buffer(server_args) == mlp_tp_gather, settings
        assert common.require_mlp_sync(server_args) == (server_args.enable_dp_attention or mlp_tp_gather), settings


def test_the_flag_is_asked_before_anything_else() -> None:
    server_args = arguments(disable_attn_tp_gather=True)
    server_args.moe_dense_tp_size = 4
    assert common.require_attn_tp_gather(server_args) is False
    assert common.require_gathered_buffer(server_args) is False
    assert common.require_mlp_sync(server_args) is False
    server_args.disable_attn_tp_gather = False
    with pytest.raises(AssertionError):
        common.require_attn_tp_gather(server_args)


@pytest.mark.by_plugin
def test_arguments_made_before_the_plugin_was_loaded_keep_the_default() -> None:
    @dataclasses.dataclass
    class WithoutTheField:
        moe_dense_tp_size: int = 1
        enable_dp_attention: bool = False

    assert common.require_attn_tp_gather(WithoutTheField()) is True


@pytest.mark.parametrize(
    "module",
    ["sglang.srt.utils", "sglang.srt.model_executor.model_runner", "sglang.srt.model_executor.cuda_graph_runner"],
)
def test_modules_that_have_copied_the_function_ask_the_flag(module: str) -> None:
    server_args = arguments(disable_attn_tp_gather=True)
    server_args.moe_dense_tp_size = 4
    assert importlib.import_module(module).require_attn_tp_gather(server_args) is False


def test_the_scheduler_has_nothing_to_synchronise(with_settings: Callable[..., ServerArgs]) -> None:
    settings = {"a2a": "deepep", "tp_size": 8, "moe_dense_tp_size": 1}
    # What Scheduler.__init__ stores, and asks before its all-gather over gloo.
    assert scheduler.require_mlp_sync(with_settings(**settings)) is True
    assert scheduler.require_mlp_sync(with_settings(**settings, disable_attn_tp_gather=True)) is False


@pytest.fixture
def gathering_runner(
    runner: ModelRunner, set_attn_tp_size: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> ModelRunner:
    """A runner whose dense layers ask for the gather, with four attention TP ranks."""
    set_attn_tp_size(4)
    monkeypatch.setattr(runner.server_args, "moe_dense_tp_size", 1)
    monkeypatch.setattr(runner.server_args, FIELD, False)
    return runner


@pytest.mark.parametrize(("disabled", "batch_sizes"), [(False, [4, 8, 12, 16]), (True, [1, 2, 3, 4, 8, 12, 15, 16])])
def test_batch_sizes_of_graphs_are_not_padded(
    disabled: bool, batch_sizes: list[int], gathering_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.model_executor.cuda_graph_runner import get_batch_sizes_to_capture

    monkeypatch.setattr(gathering_runner.server_args, "cuda_graph_bs", [1, 2, 3, 4, 8, 12, 15, 16])
    monkeypatch.setattr(gathering_runner.server_args, FIELD, disabled)
    captured, _ = get_batch_sizes_to_capture(gathering_runner)
    assert captured == batch_sizes


@pytest.mark.parametrize(("disabled", "batch_size", "buffer_len"), [(False, 4, 4), (True, 7, None)])
def test_a_dummy_run_allocates_no_gathered_buffer(
    disabled: bool,
    batch_size: int,
    buffer_len: int | None,
    gathering_runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = []
    monkeypatch.setattr(gathering_runner.server_args, FIELD, disabled)
    monkeypatch.setattr(gathering_runner.attn_backend, "init_forward_metadata", batches.append)
    monkeypatch.setattr(gathering_runner.model, "forward", lambda *args, **kwargs: None)  # its ranks are not there
    gathering_runner._dummy_run(7)
    (batch,) = batches
    assert (batch.batch_size, batch.global_dp_buffer_len) == (batch_size, buffer_len)


class Reached(Exception):
    """The model is called, with these tokens."""


@pytest.mark.parametrize(("disabled", "num_token_non_padded"), [(False, 2), (True, 7)])
def test_a_forward_counts_the_tokens_of_all_ranks(
    disabled: bool,
    num_token_non_padded: int,
    gathering_runner: ModelRunner,
    cuda: CudaRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = gathering_runner
    batches: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(runner.attn_backend, "init_forward_metadata", batches.append)
        patch.setattr(runner.model, "forward", lambda *args, **kwargs: None)
        runner._dummy_run(8)
    (batch,) = batches
    # As the scheduler hands it over: 7 tokens, padded to 8 for four ranks.
    batch.num_token_non_padded = torch.tensor(7)
    batch.global_num_tokens_cpu = batch.global_num_tokens_for_logprob_cpu = [8]
    batch.lora_ids = [None] * 8
    monkeypatch.setattr(runner.server_args, FIELD, disabled)

    def forward(ids: torch.Tensor, positions: torch.Tensor, batch: Any, **_: Any) -> None:
        raise Reached(batch.num_token_non_padded.item())

    monkeypatch.setattr(runner.model, "forward", forward)
    with pytest.raises(Reached) as reached:
        runner.forward(batch)
    assert reached.value.args == (num_token_non_padded,)
