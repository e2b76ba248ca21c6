"""Targets that no dry forward reaches, which are added by rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch
from kit.release import sglang_directory
from kit.wrapped_gemms import BF16, DENSE, K, target
from sglang_warmstart.sglang.exact_warmup.unreached import unreached
from sglang_warmstart.sglang.seams import seam

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

LIBRARY = SimpleNamespace(get_num_sms=lambda: 132)
FOUND = [target(DENSE), target(DENSE, n=768), target(BF16)]


def test_nothing_is_added_where_serving_changes_no_number_of_sms(runner: ModelRunner) -> None:
    assert unreached(FOUND, runner, LIBRARY) == []


def overlap_two_batches(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = {**seam().decided(runner.server_args)}
    assert decided["enable_two_batch_overlap"] is False
    monkeypatch.setattr(type(seam()), "decided", lambda *_: {**decided, "enable_two_batch_overlap": True})


def test_two_batch_overlap_runs_all_gemms_on_what_deep_ep_leaves(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.moe.token_dispatcher import deepep

    # It asks DeepEP, which needs a GPU.
    monkeypatch.setattr(deepep.DeepEPConfig, "get_instance", lambda: SimpleNamespace(num_sms=24))
    overlap_two_batches(runner, monkeypatch)
    assert unreached(FOUND, runner, LIBRARY) == [msgspec.structs.replace(each, num_sms=108) for each in FOUND]


def test_without_deep_ep_they_are_met_when_they_are_called(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap_two_batches(runner, monkeypatch)
    assert unreached(FOUND, runner, LIBRARY) == []


def test_an_indexer_projects_its_queries_on_half_of_the_sms_beside_another_stream(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer = torch.nn.Module()
    indexer.wq_b = torch.nn.Linear(K, 768, bias=False)
    indexer.half_device_sm_count = 72
    monkeypatch.setitem(runner.model._modules, "indexer", indexer)
    assert unreached(FOUND, runner, LIBRARY) == [target(DENSE, n=768, num_sms=72)]
    found_on_fewer = [target(DENSE, n=768, num_sms=100), target(DENSE, n=768, num_sms=72), target(DENSE, n=768)]
    assert unreached(found_on_fewer, runner, LIBRARY) == [], "it is known already"


def test_sglangs_indexers_have_the_names_that_the_rule_asks_for() -> None:
    attention = sglang_directory() / "srt" / "layers" / "attention"
    sources = [path.read_text() for path in attention.rglob("*_indexer.py")]
    assert [source for source in sources if "self.half_device_sm_count = " in source and "self.wq_b = " in source]
