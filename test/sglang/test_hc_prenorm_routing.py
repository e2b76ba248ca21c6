"""F3 by the plugin: DeepGEMM's own attribute becomes the wrapper when a model that needs it is built."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from kit.delivery import Delivery, delivered
from kit.gpu_standins import DeepGemm
from kit.prenorm import Prenorm

if TYPE_CHECKING:
    from sglang_warmstart.sglang.feature import Installation

FEATURE = "hc-prenorm"

pytestmark = pytest.mark.by_plugin


@pytest.fixture(autouse=True)
def delivery() -> Iterator[Delivery]:
    """Installed anew for each test: what has been routed is remembered."""
    with delivered() as delivery:
        yield delivery


@pytest.fixture
def installation(delivery: Delivery) -> Installation:
    """The feature in this process."""
    from sglang_warmstart.plugin import loaded_plugin

    plugin = loaded_plugin()
    assert plugin is not None
    (installation,) = (each for each in plugin.installations if each.feature.name == FEATURE)
    return installation


@pytest.fixture(autouse=True)
def first_rank(compile_utils: ModuleType) -> None:
    """The rank that warms, with a short list of Ms."""
    compile_utils._BUILTIN_M_LIST = [1, 2, 3]
    compile_utils._DO_COMPILE_ALL = True


def begin_a_layer(deepseek_v4: ModuleType) -> None:
    """Begin to build a layer. Without a config it fails at the first look at that, which is late enough."""
    with pytest.raises(AttributeError, match="hidden_size"):
        deepseek_v4.DeepseekV4DecoderLayer(object(), 0)


def exported(deep_gemm: DeepGemm) -> Any:
    return deep_gemm.module.tf32_hc_prenorm_gemm


def test_deep_gemm_is_untouched_until_a_layer_is_built(deep_gemm: DeepGemm, deepseek_v4: ModuleType) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    own = exported(deep_gemm)
    Prenorm(4, None).run()  # a use of the wrapper alone routes nothing
    assert exported(deep_gemm) is own

    begin_a_layer(deepseek_v4)
    assert exported(deep_gemm) is entrypoint.tf32_hc_prenorm_gemm
    assert entrypoint.tf32_hc_prenorm_gemm.direct() is own

    begin_a_layer(deepseek_v4)
    assert entrypoint.tf32_hc_prenorm_gemm.direct() is own


def test_importing_the_model_touches_nothing(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, installation: Installation
) -> None:
    own = exported(deep_gemm)
    installation.hooks.undo()
    for step in installation.feature.steps:  # again, now that there is a DeepGEMM
        if all(name in sys.modules for name in step.modules):
            step.install(installation.hooks, *(sys.modules[name] for name in step.modules))
    assert exported(deep_gemm) is own
    begin_a_layer(deepseek_v4)
    assert exported(deep_gemm) is not own


def test_a_layer_is_routed_before_anything_in_it_is_built(deep_gemm: DeepGemm, deepseek_v4: ModuleType) -> None:
    own = exported(deep_gemm)
    begin_a_layer(deepseek_v4)
    assert exported(deep_gemm) is not own


def test_without_jit_deep_gemm_stays_untouched(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    monkeypatch.setattr(entrypoint, "ENABLE_JIT_DEEPGEMM", False)
    own = exported(deep_gemm)
    begin_a_layer(deepseek_v4)
    assert exported(deep_gemm) is own


def test_a_deep_gemm_without_the_function_is_left_alone(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    del deep_gemm.module.tf32_hc_prenorm_gemm
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            begin_a_layer(deepseek_v4)
    assert not hasattr(deep_gemm.module, "tf32_hc_prenorm_gemm")
    assert caplog.text.count("hc-prenorm stands aside: deep_gemm.tf32_hc_prenorm_gemm: not there") == 1


def test_what_another_plugin_wraps_around_the_wrapper_later_is_not_taken_for_deep_gemms_own(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType
) -> None:
    begin_a_layer(deepseek_v4)
    ours = exported(deep_gemm)
    calls = []

    def profiled(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        ours(*args, **kwargs)

    deep_gemm.module.tf32_hc_prenorm_gemm = profiled
    begin_a_layer(deepseek_v4)
    assert exported(deep_gemm) is profiled
    prenorm = Prenorm(4, None)
    profiled(prenorm.x, prenorm.fn, prenorm.out, prenorm.sqrsum, None)
    prenorm.check()
    assert len(calls) == 1


def test_what_is_routed_can_be_taken_back(deep_gemm: DeepGemm) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint
    from sglang_warmstart.base.hooks import Hooks
    from sglang_warmstart.sglang.hc_prenorm import route_hc_prenorm

    own, wrapper, hooks = exported(deep_gemm), entrypoint.tf32_hc_prenorm_gemm, Hooks("hc-prenorm")
    route_hc_prenorm(hooks, entrypoint, deep_gemm.module)
    assert exported(deep_gemm) is wrapper
    hooks.undo()
    assert exported(deep_gemm) is own
    assert entrypoint.tf32_hc_prenorm_gemm is wrapper, "the wrapper itself was not made by the routing"


def test_a_plugin_that_has_routed_leaves_nothing_behind(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, installation: Installation
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    own = exported(deep_gemm)
    begin_a_layer(deepseek_v4)
    installation.hooks.undo()
    assert exported(deep_gemm) is own
    # Later releases have one of their own, and have it back.
    assert not hasattr(vars(entrypoint).get("tf32_hc_prenorm_gemm"), "direct")
