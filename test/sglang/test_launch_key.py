"""The key of a marker: all that a server was started with, but what is known not to matter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sglang_warmstart.sglang.arguments import defaults
from sglang_warmstart.sglang.exact_warmup.immaterial import IMMATERIAL_ARGUMENTS, is_material
from sglang_warmstart.sglang.exact_warmup.launch import launch_of
from sglang_warmstart.sglang.seams import seam

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# Of either release; what the other one has is checked when the tests run on it.
_LATER = """
    allowed_media_domains constrained_json_max_whitespace_cnt decoupled_spec_bind_endpoint
    decoupled_spec_connect_endpoints decoupled_spec_rank default_chat_template_kwargs enable_http_worker_reuseport
    enable_response_store encoder_bootstrap_port encoder_register_urls flexkv_config_file gated_launch_port grpc_port
    grpc_response_timeout_secs grpc_worker_threads hicache_host_memory_fraction http2_initial_connection_window_size
    http2_max_concurrent_streams lmcache_config_file load_publish_endpoint load_snapshot_publish_interval
    media_url_max_file_size_mb otlp_service_name ple_offload_dir sidecar sidecar_args smg_grpc_mode
    smg_http_sidecar_port spec_trace_dir speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path
    startup_weight_load_mode stat_loggers trace_modules trust_mm_content_hashes trust_request_chat_template
    unified_cache_external_linker_config uno_lora_path watermark_config watermark_key watermark_key_b
    weight_cache_mode weight_cache_socket weight_cache_timeout
"""
ONLY_IN_0_5_23 = frozenset(_LATER.split())


@pytest.mark.release("0.5.12")
def test_each_name_of_the_list_is_an_argument(runner: ModelRunner) -> None:
    assert not IMMATERIAL_ARGUMENTS - ONLY_IN_0_5_23 - seam().decided(runner.server_args).keys()


@pytest.mark.release("0.5.23")
def test_each_name_of_the_later_release_is_an_argument_there(runner: ModelRunner) -> None:
    assert not ONLY_IN_0_5_23 - seam().decided(runner.server_args).keys()
    assert seam().decided(runner.server_args)["device"] == "cpu"


@pytest.mark.release("0.5.12")
def test_each_argument_changes_the_key_unless_it_is_in_the_list(runner: ModelRunner) -> None:
    arguments = copy.copy(runner.server_args)
    usual = launch_of(arguments, 0, {})
    for name in defaults(type(arguments)):
        before = getattr(arguments, name)
        setattr(arguments, name, "/nowhere/else" if name.endswith("model_path") else ["another"])
        changed = launch_of(arguments, 0, {})
        setattr(arguments, name, before)
        # A draft model is told by its configuration, as the model is.
        is_draft = name == "speculative_draft_model_path"
        assert (changed != usual) is (name not in IMMATERIAL_ARGUMENTS or is_draft), name
    assert launch_of(arguments, 1, {}) != usual


@pytest.mark.release("0.5.12")
def test_a_draft_model_is_told_by_its_configuration_wherever_it_lies(runner: ModelRunner, tmp_path: Path) -> None:
    def launch(place: str, text: str) -> dict[str, str]:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "config.json").write_text(text)
        arguments: Any = copy.copy(runner.server_args)
        arguments.speculative_draft_model_path = str(tmp_path / place)
        return launch_of(arguments, 0, {})

    assert launch("here", '{"hidden_size": 64}') == launch("there", '{"hidden_size": 64}')
    assert launch("here", '{"hidden_size": 64}') != launch("here", '{"hidden_size": 128}')


def test_nothing_secret_or_random_is_in_it(runner: ModelRunner) -> None:
    environment = {"SGLANG_RUN_ID": "sglang-run-1", "EXA_API_KEY": "s3", "SGLANG_DEEPGEMM_ON_H20": ""}
    launch = launch_of(runner.server_args, 0, environment)
    assert not {"random_seed", "nccl_port", "api_key", "model_path", *environment} & launch.keys()


@pytest.mark.parametrize(
    ("variable", "matters"),
    [
        ("SGLANG_DEEPGEMM_STANDARD_LAYOUT", True),
        ("SGLANG_OPT_FP8_WO_A_GEMM", True),
        ("SGLANG_A_SWITCH_OF_THE_NEXT_RELEASE", True),
        ("USE_TRITON_W8A8_FP8_KERNEL", True),
        ("SGLANG_WARMSTART_STRICT", False),
        ("SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS", False),
        ("SGLANG_LOG_MS", False),
        ("SGLANG_CACHE_DIR", False),
        ("SGLANG_HOST_IP", False),
        ("HOME", False),
    ],
)
def test_variables_of_sglang_are_in_it_but_those_known_not_to_matter(
    variable: str, matters: bool, runner: ModelRunner
) -> None:
    assert is_material(variable) is matters
    assert (variable in launch_of(runner.server_args, 0, {variable: "1"})) is matters
