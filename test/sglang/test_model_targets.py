"""The targets of a model without a GPU, compared with those that real servers met on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kit.model import write_tiny_llama
from kit.model_targets import asked, differences
from kit.release import installed_release
from sglang_warmstart.deepgemm.gemms import GEMMS
from sglang_warmstart.deepgemm.nogpu.devices import GPUS
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang.model_targets.ask import RefusalError, ranks_of, united
from sglang_warmstart.sglang.model_targets.pretended_gpu import MEMORY_MIB
from sglang_warmstart.sglang.model_targets.protocol import NotFound, Ranks

GPU_TESTS = Path(__file__).parents[1] / "gpu"
# What `record` found on two H200s, with the arguments of the server. A start that failed has no ranks.
STARTS: dict[str, Any] = json.loads((GPU_TESTS / "results" / "model_targets.json").read_text())["starts"]
RECORDED = {name: start for name, start in STARTS.items() if start["ranks"]}
DEEPSEEK = "deepseek-v3-2layer"
# And what real servers of 0.5.23 asked for, with the shapes of DeepSeek-V4.
DEEPSEEK_V4 = json.loads((GPU_TESTS / "results" / "deepseek-v4-targets-0.5.23.json").read_text())["starts"]

Found = dict[str, list[Ranks] | str]


def model(directory: Path, name: str, source: str = DEEPSEEK, **changes: object) -> str:
    """A directory with a configuration of `test/gpu`, changed."""
    path = directory / name
    path.mkdir()
    config = json.loads((GPU_TESTS / f"{source}.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All servers of this module, asked in one process."""
    if installed_release().version != "0.5.12":
        pytest.skip("the starts on GPUs are of SGLang 0.5.12")
    directory = tmp_path_factory.mktemp("models")
    deepseek, qwen = model(directory, DEEPSEEK), model(directory, "qwen", "qwen3-235b-a22b-fp8-2layer")
    models = {DEEPSEEK: deepseek, "qwen3-235b-a22b-fp8-2layer": qwen}
    deep_ep = ("--tp", "2", "--ep", "2", "--moe-a2a-backend")
    servers = {name: ("--model-path", models[start["config"]], *start["arguments"]) for name, start in RECORDED.items()}
    servers |= {
        "pp 2, alike": ("--model-path", qwen, "--pp-size", "2"),
        "chunk": ("--model-path", qwen, "--chunked-prefill-size", "16384"),
        "DeepEP": ("--model-path", deepseek, *deep_ep, "deepep"),
        "Marlin": ("--model-path", deepseek, "--moe-runner-backend", "marlin"),
        "another runner": ("--model-path", deepseek, "--moe-runner-backend", "cutlass"),
        "no package": ("--model-path", deepseek, *deep_ep, "mooncake"),
        "NextN": (
            "--model-path",
            model(directory, "nextn", num_nextn_predict_layers=1, first_k_dense_replace=2),
            "--speculative-algorithm",
            "NEXTN",
        ),
        "unquantised": ("--model-path", str(write_tiny_llama(directory / "llama")), "--disable-attn-tp-gather"),
        "unknown": ("--model-path", model(directory, "unknown", architectures=["NobodyForCausalLM"])),
        "odd": ("--model-path", qwen, "--nonsense", "3"),
        "impossible": ("--model-path", qwen, "--tp", "3"),
    }
    return asked(servers, tmp_path_factory.mktemp("answers"))


def ranks(found: Found, name: str) -> list[Ranks]:
    answer = found[name]
    assert not isinstance(answer, str), answer
    return answer


def targets(found: Found, name: str) -> set[Target]:
    (only,) = ranks(found, name)
    return set(only.targets)


def shapes(found: Found, name: str) -> set[tuple[str, int, int, int]]:
    return {(each.kernel_type, each.n, each.k, each.num_groups) for each in targets(found, name)}


@pytest.mark.parametrize("name", RECORDED)
def test_the_targets_are_those_that_a_server_met_on_gpus_field_by_field(name: str, found: Found) -> None:
    by_rank = {str(rank): each for each in ranks(found, name) for rank in each.ranks}
    assert set(by_rank) == set(RECORDED[name]["ranks"])
    for rank, real in RECORDED[name]["ranks"].items():
        assert differences(msgspec.convert(real, list[Target]), by_rank[rank].targets) == []
        assert by_rank[rank].not_found == ()


def test_the_starts_on_gpus_have_every_split_and_grouped_targets() -> None:
    arguments = " ".join(" ".join(start["arguments"]) for start in RECORDED.values())
    for flag in ("--tp 2", "--pp-size 2", "--ep 2", "--enable-dp-attention", "--moe-dense-tp-size 1"):
        assert flag in arguments
    kinds = {each["kernel_type"] for start in RECORDED.values() for rank in start["ranks"].values() for each in rank}
    assert kinds == {"GEMM_NT_F8F8BF16", "GROUPED_GEMM_NT_F8F8BF16_MASKED"} <= set(GEMMS)


def test_two_ranks_halve_what_is_split_among_them_and_nothing_else(found: Found) -> None:
    alone, halves = shapes(found, "deepseek tp 1"), shapes(found, "deepseek tp 2")
    whole = ("GEMM_NT_F8F8BF16", 2112, 7168, 1)  # each rank has all of the low-rank projection
    # Split by columns are the projections into heads and into the hidden width of an MLP, by rows those back.
    by_columns = {(24576, 1536), (32768, 512), (36864, 7168), (4096, 7168)}
    columns = {(kind, n // 2, k, groups) for kind, n, k, groups in alone if (n, k) in by_columns}
    rows = {(kind, n, k // 2, groups) for kind, n, k, groups in alone - {whole} if (n, k) not in by_columns}
    assert halves == {whole} | columns | rows


def test_stages_with_the_same_layers_are_one_entry_and_others_are_not(found: Found) -> None:
    assert [each.ranks for each in ranks(found, "pp 2, alike")] == [(0, 1)]
    dense, experts = ranks(found, "deepseek pp 2")
    assert (dense.ranks, experts.ranks) == ((0,), (1,))
    assert set(dense.targets) != set(experts.targets)


def test_the_range_of_m_follows_the_prefill_chunk(found: Found) -> None:
    assert {each.m_max for each in targets(found, "chunk")} == {32768}
    assert {each.m_max for each in targets(found, "qwen tp 1")} == {16384}


def test_experts_behind_deepep_have_targets_for_prefill_and_for_decode(found: Found) -> None:
    grouped = {each for each in shapes(found, "DeepEP") if each[3] > 1}
    expected = {(n, k, 16) for n, k in ((4096, 7168), (7168, 2048))}
    assert grouped == {
        (f"GROUPED_GEMM_NT_F8F8BF16_{kind}", *shape) for kind in ("CONTIG", "MASKED") for shape in expected
    }
    alignments = {each.kernel_type: each.m_alignment for each in targets(found, "DeepEP")}
    assert alignments["GROUPED_GEMM_NT_F8F8BF16_CONTIG"] == 128


def test_a_layer_that_cannot_be_called_is_named_and_the_others_are_there(found: Found) -> None:
    # SGLang 0.5.12 gives FP8 experts no runner for this backend.
    (only,) = ranks(found, "Marlin")
    (failed,) = only.not_found
    assert failed.module == "model.layers.1.mlp.experts"
    assert "Fp8MoEMethod: its call failed: AttributeError: " in failed.reason
    assert len(only.targets) == 8


def test_the_model_that_drafts_is_called_too(found: Found) -> None:
    # Its layer has experts and shared ones. The model itself has none here.
    (only,) = ranks(found, "NextN")
    assert only.models == ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN")
    assert {(each.n, each.k) for each in only.targets} >= {(36864, 7168), (4096, 7168)}


def test_a_model_without_quantisation_has_layers_and_no_target(found: Found) -> None:
    (only,) = ranks(found, "unquantised")
    assert (only.targets, only.not_found, only.models) == ((), (), ("LlamaForCausalLM",))
    assert only.layers > 0


def test_experts_of_another_library_have_no_targets(found: Found) -> None:
    (only,) = ranks(found, "another runner")
    assert only.not_found == ()
    assert {each.num_groups for each in only.targets} == {1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no package", "ImportError: Mooncake EP is not installed."),
        ("unknown", "'NobodyForCausalLM'"),
        ("odd", "unrecognized arguments: --nonsense 3"),
        ("impossible", "the model cannot be built here: "),
    ],
)
def test_what_sglang_refuses_is_its_own_line(name: str, reason: str, found: Found) -> None:
    answer = found[name]
    assert isinstance(answer, str)
    assert reason in answer
    assert "\n" not in answer


def test_each_later_release_has_the_same_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of DeepSeek-V3, by starts of 0.5.12, and those of DeepSeek-V4, by starts of 0.5.23."""
    if installed_release().version == "0.5.12":
        pytest.skip("its own starts are compared with above")
    monkeypatch.setenv("SGLANG_DSV4_FP4_EXPERTS", "0")
    chunk = ("--chunked-prefill-size", "4096")
    deepseek, deepseek_v4 = model(tmp_path, DEEPSEEK), model(tmp_path, "deepseek-v4", "deepseek-v4-4layer")
    splits = {"deepseek tp 1": (), "deepseek pp 2": ("--pp-size", "2"), "deepseek tp 2": ("--tp", "2")}
    servers = {name: ("--model-path", deepseek, *chunk, *arguments) for name, arguments in splits.items()}
    servers |= {name: ("--model-path", deepseek_v4, *chunk, *each["arguments"]) for name, each in DEEPSEEK_V4.items()}
    found = asked(servers, tmp_path)
    for name in splits:
        for each in ranks(found, name):
            real = msgspec.convert(RECORDED[name]["ranks"][str(each.ranks[0])], list[Target])
            assert (differences(real, each.targets), each.not_found) == ([], ())
    for name, start in DEEPSEEK_V4.items():
        for each in ranks(found, name):
            real = set(map(as_installed, msgspec.convert(start["ranks"][str(each.ranks[0])], list[Target])))
            if each.not_found:
                assert installed_release().version == "0.5.14"
                assert [only.module for only in each.not_found] == ["mHC"]
                real = {target for target in real if target.kernel_type.startswith("GEMM")}
            assert real <= set(each.targets)
            # The output projection is in two parts, and the weights of the first are multiplied in another way.
            beyond = set(each.targets) - real
            assert {(target.kernel_type, target.k) for target in beyond} <= {("GEMM_NT_F8F8BF16", 4096)}
            assert len(beyond) <= 1


def as_installed(target: Target) -> Target:
    """A target of DeepSeek-V4 on 0.5.23, as the installed release has it: the scales of activations were laid out."""
    if not target.lhs_scale or installed_release().since("0.5.23"):
        return target
    return msgspec.structs.replace(target, lhs_scale="tma")


@pytest.mark.release("0.5.23")
def test_a_later_release_has_both_layouts_of_experts(tmp_path: Path) -> None:
    by_deep_gemm = ("--chunked-prefill-size", "4096", "--tp", "2", "--moe-runner-backend", "deep_gemm")
    found = asked({"experts": ("--model-path", model(tmp_path, DEEPSEEK), *by_deep_gemm)}, tmp_path)
    (only,) = ranks(found, "experts")
    masked = msgspec.convert(RECORDED["deepseek tp 2, experts by DeepGEMM"]["ranks"]["0"], list[Target])
    beyond = set(only.targets) - set(masked)
    assert (set(masked) <= set(only.targets), only.not_found) == (True, ())
    assert {(each.kernel_type, each.m_alignment) for each in beyond} == {("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 128)}
    assert len(beyond) == 2


def test_without_a_configuration_nobody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="is no directory with a config"):
        ranks_of(["--model-path", str(tmp_path)], None)  # type: ignore[arg-type]
    with pytest.raises(RefusalError, match="is no directory with a config"):
        ranks_of(["--model-path=deepseek-ai/DeepSeek-V3"], None)  # type: ignore[arg-type]


def test_layers_that_fail_alike_are_one_line() -> None:
    failed = tuple(NotFound(f"model.layers.{number}.mlp.experts", "why") for number in range(3, 61))
    other = NotFound("model.layers.3.mlp.experts", "another reason")
    (only,) = united([Ranks((0,), ("Model",), 60, (), (*failed, other))])
    assert only.not_found == (NotFound("model.layers.3.mlp.experts and 57 like it", "why"), other)


def test_every_gpu_that_can_be_planned_for_has_a_size_of_memory() -> None:
    assert {name for name, *_ in GPUS.values()} == set(MEMORY_MIB)
