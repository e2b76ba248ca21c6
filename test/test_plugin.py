"""What the plugin does to a real SGLang: every case in a process of its own, which loads plugins as SGLang does.

The functions named `case_...` run in that process; what they return is what the tests look at.
"""

import argparse
import importlib
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit.environment import child_environment
from kit.fork_server import ForkServer
from kit.release import installed_release
from sglang_warmstart.sglang.feature import State

on_0_5_12 = pytest.mark.release("0.5.12")
on_0_5_23 = pytest.mark.release("0.5.23")

COMMON = "sglang.srt.utils.common"
SERVER_ARGS = "sglang.srt.server_args"
MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
COMPILE_UTILS = "sglang.srt.layers.deep_gemm_wrapper.compile_utils"
ENTRYPOINT = "sglang.srt.layers.deep_gemm_wrapper.entrypoint"
DEEPSEEK_V4 = "sglang.srt.models.deepseek_v4"
NEXTN = "sglang.srt.models.deepseek_v4_nextn"
MHC = "sglang.srt.layers.mhc"
ENVIRON = "sglang.srt.environ"
ENGINE = "sglang.srt.entrypoints.engine"
SCHEDULER = "sglang.srt.managers.scheduler"

# What the features replace in SGLang 0.5.12, and what they add to it.
REPLACED = (
    f"{COMMON}:require_attn_tp_gather",
    f"{COMMON}:configure_logger",
    f"{SERVER_ARGS}:ServerArgs.add_cli_args",
    f"{SERVER_ARGS}:ServerArgs.__post_init__",
    f"{COMPILE_UTILS}:update_deep_gemm_config",
    f"{COMPILE_UTILS}:_compile_deep_gemm_one_type_all",
    f"{COMPILE_UTILS}:_maybe_compile_deep_gemm_one_type_all",
    f"{COMPILE_UTILS}:DeepGemmKernelType",
    f"{COMPILE_UTILS}:_BaseWarmupExecutor.create",
    f"{COMPILE_UTILS}:_BaseWarmupExecutor.get_memory_requirement",
    f"{ENTRYPOINT}:_sanity_check_input",
    f"{MODEL_RUNNER}:ModelRunner._dummy_run",
    f"{MODEL_RUNNER}:ModelRunner.kernel_warmup",
    f"{DEEPSEEK_V4}:DeepseekV4DecoderLayer.__init__",
    f"{ENGINE}:Engine._launch_scheduler_processes",
)
ADDED = (
    f"{ENVIRON}:Envs.SGLANG_WARMSTART",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_STRICT",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_COMPILER",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUILD_AHEAD",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUNDLE",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUNDLE_KEY",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_JIT_MONITOR",
    f"{ENVIRON}:Envs.SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
    f"{SERVER_ARGS}:ServerArgs.disable_attn_tp_gather",
    f"{COMPILE_UTILS}:pp_parallel_deep_gemm_warmup",
    f"{ENTRYPOINT}:tf32_hc_prenorm_gemm",
    f"{MHC}:get_mhc_pre_token_count_representatives",
    f"{DEEPSEEK_V4}:DeepseekV4DecoderLayer.prewarm_mhc_token_counts",
    f"{DEEPSEEK_V4}:DeepseekV4DecoderLayer.prewarm_mhc_token_count_buckets",
    f"{DEEPSEEK_V4}:DeepseekV4Model.prewarm_mhc_token_count_buckets",
    f"{DEEPSEEK_V4}:DeepseekV4ForCausalLM.prewarm_mhc_token_count_buckets",
    f"{DEEPSEEK_V4}:DeepseekV4ForCausalLM.kernel_warmup",
    f"{NEXTN}:DeepseekV4ModelNextN.prewarm_mhc_token_count_buckets",
)
# The methods whose seconds are recorded, as far as they are the class's own.
STEPS_IN_0_5_23 = (
    "init_torch_distributed",
    "load_model",
    "alloc_memory_pool",
    "init_attention_backends",
    "init_cuda_graphs",
)
# F2, F3, F6, the monitor, events, and the plugin's own log hook and switches: all that a release gets that has the rest
# built in.
RUNNERS = "sglang.srt.model_executor.runner"
CHANGED_IN_0_5_23 = {
    *(f"{MODEL_RUNNER}:ModelRunner.{step}" for step in STEPS_IN_0_5_23),
    f"{MODEL_RUNNER}:ModelRunner.forward",
    *(f"{RUNNERS}.base_runner:BaseRunner.{name}" for name in ("_dummy_run", "warmup")),
    f"{RUNNERS}.flashinfer_autotune:should_run_flashinfer_autotune",
    f"{RUNNERS}.decode_cuda_graph_runner:DecodeCudaGraphRunner.capture_one_shape",
    f"{RUNNERS}.prefill_cuda_graph_runner:PrefillCudaGraphRunner.capture_one_shape",
    "sglang.kernels.jit.utils.compile.ninja:build",
    "sglang.kernels.jit.utils.compile.ninja:generate",
    "sglang.kernels.ops.layernorm.mhc:prewarm_mhc_pre",
    f"{SCHEDULER}:Scheduler.__init__",
    f"{SCHEDULER}:Scheduler.run_event_loop",
    f"{ENGINE}:Engine._launch_subprocesses",
    f"{COMMON}:configure_logger",
    f"{COMPILE_UTILS}:update_deep_gemm_config",
    f"{ENTRYPOINT}:update_deep_gemm_config",
    f"{COMPILE_UTILS}:_compile_deep_gemm_one_type_all",
    f"{COMPILE_UTILS}:_maybe_compile_deep_gemm_one_type_all",
    f"{COMPILE_UTILS}:DeepGemmKernelType",
    f"{COMPILE_UTILS}:_BaseWarmupExecutor.create",
    f"{COMPILE_UTILS}:_BaseWarmupExecutor.get_memory_requirement",
    f"{ENGINE}:Engine._launch_scheduler_processes",
    f"{ENTRYPOINT}:_sanity_check_input",
    # What constructs a layer where there is no CUDA.
    "sglang.srt.models.deepseek_v4_platform_stage:NonCudaDecoderMixin.__init__",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_STRICT",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_COMPILER",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUILD_AHEAD",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUNDLE",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_BUNDLE_KEY",
    f"{ENVIRON}:Envs.SGLANG_WARMSTART_JIT_MONITOR",
}
OURS_IN_0_5_23 = {"fast-warmup", "hc-prenorm", "build-ahead", "exact-warmup", "bundle-restore", "jit-monitor"}
OURS_IN_0_5_23 |= {"start-up-events"}
ALL_FEATURES = {*OURS_IN_0_5_23, "mhc-prewarm", "pp-parallel-warmup", "attn-tp-gather"}

LOGGING_IS_CONFIGURED = "(logging is configured)"
_CHILD = "import json, sys; sys.path.insert(0, sys.argv[1]); import {module}; print(json.dumps({module}.{case}()))"


@dataclass(frozen=True)
class Outcome:
    """What a case returned, and what its process wrote to the log."""

    answer: Any
    log: str

    def lines(self, *parts: str) -> list[str]:
        """The lines of the log that have all `parts` in them."""
        return [line for line in self.log.splitlines() if all(part in line for part in parts)]


UNSET = {"SGLANG_WARMSTART": None, "SGLANG_WARMSTART_STRICT": None, "SGLANG_PLUGINS": None}


def in_a_fork(forks: ForkServer, case: Callable[[], Any], **environment: str) -> Outcome:
    """Run `case` in a process that has imported SGLang, with no switch set but those of `environment`."""
    code = _CHILD.format(module=Path(__file__).stem, case=case.__name__)
    done = forks.run(code, str(Path(__file__).parent), environment={**UNSET, **environment}, limit_s=120)
    return Outcome(json.loads(done.checked().splitlines()[-1]), done.err)


def in_a_fresh_process(case: Callable[[], Any], **environment: str) -> Outcome:
    """Run `case` in a process that has imported nothing, likewise."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _CHILD.format(module=Path(__file__).stem, case=case.__name__),
            Path(__file__).parent,
        ],
        env=child_environment({**UNSET, **environment}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return Outcome(json.loads(done.stdout.splitlines()[-1]), done.stderr)


# Used by the cases, in their own processes.


def load_plugins() -> None:
    from sglang.srt.plugins import load_plugins as load

    load()


def configure_logger(log_level: str = "info", prefix: str = "") -> None:
    import sglang.srt.utils.common as common

    print(LOGGING_IS_CONFIGURED, file=sys.stderr, flush=True)
    common.configure_logger(SimpleNamespace(log_level=log_level), prefix=prefix)


def import_targets() -> None:
    """Import what the features hook, and the scheduler, which brings in most of SGLang."""
    importlib.import_module("sglang.srt.managers.scheduler")
    for name in (ENGINE, MODEL_RUNNER, ENTRYPOINT, DEEPSEEK_V4, NEXTN):
        importlib.import_module(name)
    if installed_release().version == "0.5.12":
        importlib.import_module(MHC)


def owner_of(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    return owner, name


def found(target: str) -> object:
    owner, name = owner_of(target)
    return vars(owner).get(name)


def is_there(target: str) -> bool:
    owner, name = owner_of(target)
    return name in vars(owner)


def function_of(value: Any) -> Any:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def warmstart_layers(value: object) -> list[str]:
    """The features whose hooks are on a function, from the outermost to the original."""
    function = function_of(value)
    features = []
    while function is not None:
        features += [function.__warmstart__] if "__warmstart__" in vars(function) else []
        function = getattr(function, "__wrapped__", None)
    return features


def is_marked(value: object) -> bool:
    return "__warmstart__" in getattr(function_of(value), "__dict__", {})


def everything_in_sglang() -> dict[str, object]:
    """Every name in every SGLang module, and every attribute of the classes defined there."""
    contents: dict[str, object] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "sglang" or module_name == "sglang.srt.plugins":  # which remembers that it ran
            continue
        for name, value in list(vars(module).items()):
            contents[f"{module_name}:{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                # Written by the interpreter when somebody first asks: no change that anybody made.
                asked = {"__annotations__", "__abstractmethods__", "_abc_impl"}
                attributes = {key: each for key, each in vars(value).items() if key not in asked}
                contents.update({f"{module_name}:{name}.{key}": each for key, each in attributes.items()})
    return contents


def changes_since(before: dict[str, object]) -> set[str]:
    after = everything_in_sglang()
    missing = object()
    return {name for name in before.keys() | after.keys() if before.get(name, missing) is not after.get(name, missing)}


def is_a_copy(name: str) -> bool:
    """Whether a name of a module holds what another module defined."""
    value = everything_in_sglang().get(name)
    defined_in = getattr(value, "__module__", None)
    return isinstance(defined_in, str) and defined_in != name.partition(":")[0]


def states() -> dict[str, str]:
    from sglang_warmstart.plugin import loaded_plugin

    plugin = loaded_plugin()
    return {} if plugin is None else {each.feature.name: each.state.name for each in plugin.installations}


def has_field() -> bool:
    from sglang.srt.server_args import ServerArgs

    return "disable_attn_tp_gather" in inspect.signature(ServerArgs).parameters


def has_flag() -> bool:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return "--disable-attn-tp-gather" in parser.format_help()


# Switched on and off


def case_everything_is_imported_and_then_plugins_are_loaded() -> dict[str, Any]:
    import_targets()
    before = everything_in_sglang()
    load_plugins()
    changes = changes_since(before)
    configure_logger()
    is_0_5_12 = installed_release().version == "0.5.12"
    return {
        "changed": sorted(name for name in changes if not is_a_copy(name)),
        "replaced": [target for target in REPLACED if target in changes] if is_0_5_12 else [],
        "added": [target for target in ADDED if is_there(target)] if is_0_5_12 else [],
        "marked": sorted(name for name, value in everything_in_sglang().items() if is_marked(value)),
        "wrapped": [target for target in REPLACED if hasattr(function_of(found(target)), "__wrapped__")]
        if is_0_5_12
        else [],
        "field": has_field(),
        "flag": has_flag(),
        "states": states(),
    }


ALL_SWITCHES_BUT_THE_MAIN_ONE = {
    "SGLANG_WARMSTART_STRICT": "1",
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1",
    "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1",
}


@pytest.mark.parametrize("word", ["0", "False"])
def test_switched_off_it_leaves_everything_in_sglang_as_it_was_by_identity(forks: ForkServer, word: str) -> None:
    outcome = in_a_fork(
        forks,
        case_everything_is_imported_and_then_plugins_are_loaded,
        SGLANG_WARMSTART=word,
        **ALL_SWITCHES_BUT_THE_MAIN_ONE,
    )
    built_in = installed_release().since("0.5.13")
    assert outcome.answer == {
        "changed": [],
        "replaced": [],
        "added": [],
        "marked": [],
        "wrapped": [],
        "field": built_in,
        "flag": built_in,
        "states": {},
    }
    assert outcome.lines("warmstart") == []


@on_0_5_12
def test_switched_on_it_replaces_and_adds_all_that_the_features_need(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_everything_is_imported_and_then_plugins_are_loaded)
    assert outcome.answer["replaced"] == list(REPLACED)
    assert outcome.answer["added"] == list(ADDED)
    assert outcome.answer["field"] and outcome.answer["flag"]
    assert outcome.answer["states"] == dict.fromkeys(ALL_FEATURES, "ACTIVE")
    (line,) = outcome.lines("warmstart", "on SGLang 0.5.12")
    assert all(feature in line for feature in ALL_FEATURES)


@on_0_5_23
def test_what_a_release_has_built_in_is_left_alone_by_identity(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_everything_is_imported_and_then_plugins_are_loaded)
    # The class is made anew, with one more member, and with all that it has.
    anew = f"{COMPILE_UTILS}:DeepGemmKernelType."
    assert {name for name in outcome.answer["changed"] if not name.startswith(anew)} == CHANGED_IN_0_5_23
    assert outcome.answer["states"] == {
        **dict.fromkeys(ALL_FEATURES, "BUILT_IN"),
        **dict.fromkeys(OURS_IN_0_5_23, "ACTIVE"),
    }
    (line,) = outcome.lines("warmstart", "on SGLang 0.5.23")
    active, built_in = line.split(f"{State.BUILT_IN.value}:")
    assert all(feature in active for feature in OURS_IN_0_5_23)
    assert all(feature in built_in for feature in ALL_FEATURES - OURS_IN_0_5_23)
    assert outcome.lines("stands aside") == []


def test_an_unknown_word_in_the_switch_is_warned_of_and_counts_as_the_default(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_everything_is_imported_and_then_plugins_are_loaded, SGLANG_WARMSTART="maybe")
    assert outcome.answer["states"]["fast-warmup"] == "ACTIVE"
    (line,) = outcome.lines("SGLANG_WARMSTART", '"maybe" is not a valid boolean value')
    assert "default 1" in line


# When and how often it is loaded


def case_plugins_are_loaded_again() -> dict[str, Any]:
    import sglang.srt.plugins
    from sglang_warmstart.plugin import loaded_plugin, register

    import_targets()
    load_plugins()
    configure_logger()
    before = everything_in_sglang()
    plugin = loaded_plugin()

    load_plugins()
    sglang.srt.plugins._plugins_loaded = False  # as if another part of the program did not know of the first time
    load_plugins()
    register()
    configure_logger()
    return {"changed": sorted(changes_since(before)), "same plugin": loaded_plugin() is plugin, "states": states()}


def test_loading_twice_changes_nothing_and_says_nothing_more(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_plugins_are_loaded_again)
    assert outcome.answer["changed"] == []
    assert outcome.answer["same plugin"]
    assert "ACTIVE" in outcome.answer["states"].values()
    assert len(outcome.lines("warmstart", "on SGLang")) == 1


def hooks_of_every_holder(name: str) -> dict[str, list[str]]:
    """The features whose hooks a function of this name has, by the module that holds it."""
    return {
        module_name: warmstart_layers(vars(module)[name])
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] == "sglang" and name in vars(module)
    }


def case_the_scheduler_is_imported_before_plugins_are_loaded() -> dict[str, Any]:
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    load_plugins()
    return {name: hooks_of_every_holder(name) for name in ("require_attn_tp_gather", "update_deep_gemm_config")}


def case_the_scheduler_is_imported_after_plugins_are_loaded() -> dict[str, Any]:
    load_plugins()
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    return {name: hooks_of_every_holder(name) for name in ("require_attn_tp_gather", "update_deep_gemm_config")}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_whoever_imported_a_hooked_function_has_the_hook_whether_before_or_after(
    forks: ForkServer, before: bool
) -> None:
    if before:
        answer = in_a_fork(forks, case_the_scheduler_is_imported_before_plugins_are_loaded).answer
    else:
        answer = in_a_fresh_process(case_the_scheduler_is_imported_after_plugins_are_loaded).answer
    on_0_5_12 = ["pp-parallel-warmup"] if installed_release().version == "0.5.12" else []  # else built in
    expected = ["bundle-restore", "exact-warmup", "fast-warmup", *on_0_5_12]
    assert sorted(answer["update_deep_gemm_config"][COMPILE_UTILS]) == expected
    assert answer["update_deep_gemm_config"][ENTRYPOINT] == ["jit-monitor"]

    gather = answer["require_attn_tp_gather"]
    assert {COMMON, "sglang.srt.utils"} <= set(gather)
    if installed_release().version == "0.5.12":
        assert {"sglang.srt.model_executor.cuda_graph_runner", MODEL_RUNNER} <= set(gather)
        assert gather == {holder: ["attn-tp-gather"] for holder in gather}
    else:
        assert gather == {holder: [] for holder in gather}  # built in


def case_plugins_are_loaded_first_of_all() -> dict[str, Any]:
    import sglang.srt.plugins  # noqa: F401

    before = set(sys.modules)
    load_plugins()
    new = sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "sglang_warmstart")
    waiting = states()
    configure_logger()
    importlib.import_module(MODEL_RUNNER)
    return {
        "new": new,
        "loaded": [name for name in (MODEL_RUNNER, MHC, "tilelang") if name in before or name in new],
        "waiting": waiting,
        "then": states(),
    }


@pytest.fixture(scope="module")
def first_of_all() -> Outcome:
    return in_a_fresh_process(case_plugins_are_loaded_first_of_all)


def test_loading_imports_nothing_of_sglang_and_no_tilelang(first_of_all: Outcome) -> None:
    answer = first_of_all.answer
    assert [name for name in answer["new"] if name.split(".")[0] in ("sglang", "torch", "tilelang", "deep_gemm")] == []
    assert answer["loaded"] == []


def test_a_feature_that_waits_for_an_import_says_when_it_is_active(first_of_all: Outcome) -> None:
    outcome = first_of_all
    waiting = {name for name, state in outcome.answer["waiting"].items() if state == "WAITING"}
    assert "fast-warmup" in waiting
    for name in waiting:
        assert outcome.answer["then"][name] == "ACTIVE"
        assert len(outcome.lines(f"warmstart: {name} is active")) == 1
    (summary,) = outcome.lines("warmstart", "on SGLang")
    assert all(name in summary.split(f"{State.WAITING.value}:")[1] for name in waiting)


# What it says, and when


def case_logging_is_configured_twice() -> None:
    load_plugins()
    configure_logger(prefix=" PP7")
    configure_logger(prefix=" PP7")


def test_a_line_said_before_logging_is_configured_appears_once_after_it(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_logging_is_configured_twice)
    before, *after = outcome.log.split(LOGGING_IS_CONFIGURED)
    assert "warmstart" not in before
    assert [part.count("warmstart 0") for part in after] == [1, 0]
    (line,) = outcome.lines("on SGLang")
    assert " PP7]" in line


def case_logging_is_configured_by_somebody_else_before() -> None:
    logging.basicConfig(level=logging.INFO, format="theirs: %(message)s")
    load_plugins()
    configure_logger()


def test_a_log_that_somebody_set_up_before_gets_the_line_at_once_and_only_it() -> None:
    outcome = in_a_fresh_process(case_logging_is_configured_by_somebody_else_before)
    (line,) = outcome.lines("warmstart", "on SGLang")
    assert line.startswith("theirs: warmstart ")


def case_only_warnings_are_logged() -> None:
    load_plugins()
    configure_logger(log_level="warning")


def test_the_log_level_of_the_server_applies(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_only_warnings_are_logged, SGLANG_WARMSTART="maybe")
    assert outcome.lines("on SGLang") == []
    assert len(outcome.lines('"maybe"')) == 1


# An SGLang that is not the one that the features were written for


def load_into_changed_sglang(*undone: str) -> dict[str, Any]:
    """Load the plugins; say which of the `undone` targets are the originals again, and what is there at all."""
    before = {target: found(target) for target in undone}
    load_plugins()
    configure_logger()
    return {
        "originals": [target for target in undone if found(target) is before[target]],
        "added": [target for target in ADDED if is_there(target)],
        "field": has_field(),
        "flag": has_flag(),
        "states": states(),
    }


def case_kernel_warmup_is_missing() -> dict[str, Any]:
    import_targets()
    runner = sys.modules[MODEL_RUNNER]
    del runner.ModelRunner.kernel_warmup
    return load_into_changed_sglang(f"{MODEL_RUNNER}:ModelRunner._dummy_run")


def require_attn_tp_gather_of_a_fork(args: Any) -> bool:
    return False


def case_the_gather_check_has_another_signature() -> dict[str, Any]:
    import_targets()
    sys.modules[COMMON].require_attn_tp_gather = require_attn_tp_gather_of_a_fork
    return load_into_changed_sglang(
        f"{COMMON}:require_attn_tp_gather",
        f"{SERVER_ARGS}:ServerArgs.add_cli_args",
        f"{SERVER_ARGS}:ServerArgs.__init__",
        f"{SERVER_ARGS}:ServerArgs.__post_init__",
    )


def case_the_argument_parser_has_another_signature() -> dict[str, Any]:
    import_targets()
    cls = sys.modules[SERVER_ARGS].ServerArgs
    original = cls.add_cli_args

    def add_cli_args(parser: argparse.ArgumentParser, group: str) -> None:
        original(parser)

    cls.add_cli_args = staticmethod(add_cli_args)
    before = vars(cls)["add_cli_args"]
    # has_flag() calls it as SGLang does.
    answer = load_into_changed_sglang_with_parser(cls, original)
    answer["parser is theirs"] = answer.pop("add_cli_args") is before
    return answer


def load_into_changed_sglang_with_parser(cls: Any, original: Callable[..., None]) -> dict[str, Any]:
    targets = (f"{COMMON}:require_attn_tp_gather", f"{SERVER_ARGS}:ServerArgs.__post_init__")
    before = {target: found(target) for target in targets}
    load_plugins()
    configure_logger()
    add_cli_args = vars(cls)["add_cli_args"]
    cls.add_cli_args = staticmethod(original)
    return {
        "originals": [target for target in targets if found(target) is before[target]],
        "added": [target for target in ADDED if is_there(target)],
        "field": has_field(),
        "flag": has_flag(),
        "states": states(),
        "add_cli_args": add_cli_args,
    }


def maybe_compile_of_a_fork(kernel_type: Any, shape: tuple[int, ...]) -> None:
    """The decision to warm a target."""


def case_the_decision_to_warm_has_another_signature() -> dict[str, Any]:
    import_targets()
    sys.modules[COMPILE_UTILS]._maybe_compile_deep_gemm_one_type_all = maybe_compile_of_a_fork
    return load_into_changed_sglang(
        f"{COMPILE_UTILS}:_maybe_compile_deep_gemm_one_type_all", f"{ENGINE}:Engine._launch_scheduler_processes"
    )


def _dummy_run(self: Any, batch_size: int, run_ctx: Any = None) -> None:
    """Of a fork that has its own."""


def case_the_dummy_run_is_another_one() -> dict[str, Any]:
    import_targets()
    sys.modules[MODEL_RUNNER].ModelRunner._dummy_run = _dummy_run
    return load_into_changed_sglang(
        f"{MODEL_RUNNER}:ModelRunner._dummy_run", f"{MODEL_RUNNER}:ModelRunner.no_such_method"
    )


PP_ADDED = {f"{COMPILE_UTILS}:pp_parallel_deep_gemm_warmup", f"{ENVIRON}:Envs.SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"}
MHC_ADDED = {target for target in ADDED if "mhc" in target or target.endswith("kernel_warmup")}


def expect_to_stand_aside(outcome: Outcome, features: Iterable[str]) -> None:
    features = set(features)
    assert outcome.answer["states"] == {
        **dict.fromkeys(ALL_FEATURES, "ACTIVE"),
        **dict.fromkeys(features, "STANDS_ASIDE"),
    }
    assert len(outcome.lines("stands aside: sglang.")) == len(features)
    (summary,) = outcome.lines("warmstart", "on SGLang")
    assert all(feature in summary.split(f"{State.STANDS_ASIDE.value}:")[1] for feature in features)


@on_0_5_12
def test_a_missing_target_is_named_by_each_feature_that_needs_it_and_the_others_work(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_kernel_warmup_is_missing)
    expect_to_stand_aside(outcome, {"mhc-prewarm", "pp-parallel-warmup"})
    for feature in ("mhc-prewarm", "pp-parallel-warmup"):
        assert len(outcome.lines(f"{feature} stands aside: {MODEL_RUNNER}.ModelRunner.kernel_warmup: not there")) == 1
    assert outcome.answer["originals"] == [f"{MODEL_RUNNER}:ModelRunner._dummy_run"]
    assert set(outcome.answer["added"]) == set(ADDED) - PP_ADDED - MHC_ADDED
    assert outcome.answer["flag"]


@on_0_5_12
def test_a_function_with_other_parameters_is_named_and_its_feature_leaves_no_trace(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_the_gather_check_has_another_signature)
    expect_to_stand_aside(outcome, {"attn-tp-gather"})
    reason = "expected parameters (server_args), found (args)"
    assert len(outcome.lines(f"attn-tp-gather stands aside: {COMMON}.require_attn_tp_gather: {reason}")) == 1
    assert len(outcome.answer["originals"]) == 4
    assert (outcome.answer["field"], outcome.answer["flag"]) == (False, False)


@on_0_5_12
def test_exact_warm_up_stands_aside_where_sglang_decides_otherwise(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_the_decision_to_warm_has_another_signature)
    expect_to_stand_aside(outcome, {"exact-warmup"})
    reason = "expected parameters (kernel_type, n, k, num_groups), found (kernel_type, shape)"
    target = f"{COMPILE_UTILS}._maybe_compile_deep_gemm_one_type_all"
    assert len(outcome.lines(f"exact-warmup stands aside: {target}: {reason}")) == 1
    # The start of the schedulers is bundle-restore's, which does not need it.
    assert outcome.answer["originals"] == [f"{COMPILE_UTILS}:_maybe_compile_deep_gemm_one_type_all"]
    assert set(outcome.answer["added"]) == set(ADDED) - {f"{ENVIRON}:Envs.SGLANG_WARMSTART_COMPILER"}


@on_0_5_12
def test_what_a_feature_changed_before_it_found_the_difference_is_undone_by_identity(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_the_argument_parser_has_another_signature)
    expect_to_stand_aside(outcome, {"attn-tp-gather"})
    reason = "expected parameters (parser), found (parser, group)"
    assert len(outcome.lines(f"attn-tp-gather stands aside: {SERVER_ARGS}.ServerArgs.add_cli_args: {reason}")) == 1
    assert outcome.answer["originals"] == [
        f"{COMMON}:require_attn_tp_gather",
        f"{SERVER_ARGS}:ServerArgs.__post_init__",
    ]
    assert outcome.answer["parser is theirs"]
    assert (outcome.answer["field"], outcome.answer["flag"]) == (False, False)


@on_0_5_12
def test_a_function_whose_source_differs_is_named_with_the_line_that_was_looked_for(forks: ForkServer) -> None:
    outcome = in_a_fork(forks, case_the_dummy_run_is_another_one)
    expect_to_stand_aside(outcome, {"pp-parallel-warmup"})
    (line,) = outcome.lines(f"pp-parallel-warmup stands aside: {MODEL_RUNNER}.ModelRunner._dummy_run: edit ")
    assert line.endswith("once in its source, found 0")
    assert f"{MODEL_RUNNER}:ModelRunner._dummy_run" in outcome.answer["originals"]
    assert set(outcome.answer["added"]) == set(ADDED) - PP_ADDED
