"""Whole servers, from the command line to the tokens: with the features, beside another plugin, and switched off."""

import json
import re
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.environment import NO_PLUGIN, child_environment, python_path
from kit.fork_server import ForkServer
from kit.ports import free_ports
from kit.release import installed_release, is_patched
from kit.server import Server, cpu_server_args
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.runs import runs_of
from sglang_warmstart.report.reading import Lane, Run, find_run, read_run

on_0_5_12 = pytest.mark.release("0.5.12")
by_plugin = pytest.mark.by_plugin

FLAG = "--disable-attn-tp-gather"
PROMPT = [5, 6, 7, 8]
TOKENS = 8
TWO_STAGES = ("--pp-size", "2")
NO_SWITCHES = {
    "SGLANG_WARMSTART": None,
    "SGLANG_WARMSTART_STRICT": None,
    "SGLANG_PLUGINS": NO_PLUGIN["SGLANG_PLUGINS"] if is_patched() else None,
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": None,
}
PP_PARALLEL = {"SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1"}
BY_PATCHES = ("fast-warmup", "attn-tp-gather", "hc-prenorm", "mhc-prewarm", "pp-parallel-warmup", "exact-warmup")


@dataclass(frozen=True)
class Served:
    """What a server answered and logged, from its start to its end, and what its processes were started as."""

    tokens: list[int]
    log: str
    commands: list[str]
    metrics: str = ""

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log.splitlines() if text in line]

    @property
    def logged_flag(self) -> list[str]:
        """The values of the flag in the log; each release has its own way to write the server's arguments."""
        return re.findall(r"disable_attn_tp_gather(?:'?: |=)(\w+)", self.log)


def serve(model: Path, *arguments: str, **environment: str | None) -> Served:
    with Server(model, *arguments, environment={**NO_SWITCHES, **environment}) as server:
        tokens = server.generate(PROMPT, max_new_tokens=TOKENS)
        commands = [" ".join(process.cmdline()) for process in server.processes()]
        metrics = ""
        if "--enable-metrics" in arguments:
            place = f"http://127.0.0.1:{server.port}/metrics"
            metrics = urllib.request.urlopen(place, timeout=30).read().decode()
    return Served(tokens, server.log, commands, metrics)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the events of the server with features are."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def with_features(tiny_model: Path, cache: Path) -> Served:
    place = {"SGLANG_DG_CACHE_DIR": str(cache)}
    return serve(tiny_model, *TWO_STAGES, FLAG, "--enable-metrics", **PP_PARALLEL, **place)


@pytest.fixture(scope="module")
def run(with_features: Served, cache: Path) -> Run:
    return read_run(find_run(runs_of(cache)))


@pytest.fixture(scope="module")
def beside_another_plugin(tiny_model: Path) -> Served:
    """A server that was told to load another plugin and not this one: SGLang as it is without us."""
    return serve(tiny_model, SGLANG_PLUGINS="another", **PP_PARALLEL)


def process_of(line: str) -> str:
    """Which process of the server wrote a line, by the prefix of SGLang's log."""
    prefix = re.match(r"\[[-\d]+ [:\d]+ ?([^]]*)]", line)
    return (prefix.group(1) if prefix else "") or "main"


@by_plugin
def test_each_process_of_the_server_says_once_what_the_plugin_does_there(with_features: Served) -> None:
    said = [process_of(line) for line in with_features.lines(f"on SGLang {installed_release().version}: ")]
    # From 0.5.22 on the detokenizer loads plugins too, and its log has no prefix either.
    without_prefix = 2 if installed_release().since("0.5.22") else 1
    assert sorted(said) == ["PP0", "PP1", *["main"] * without_prefix]


@on_0_5_12
@by_plugin
def test_each_pipeline_stage_says_that_its_warm_up_is_in_place(with_features: Served) -> None:
    said = [process_of(line) for line in with_features.lines("pp-parallel-warmup is active")]
    assert sorted(said) == ["PP0", "PP1"]


@by_plugin
def test_no_feature_stands_aside(with_features: Served) -> None:
    assert with_features.lines("fast-warmup")
    assert with_features.lines("stands aside") == []


def test_on_a_cpu_there_is_no_service_for_exact_warm_up(with_features: Served) -> None:
    assert with_features.commands
    assert [command for command in with_features.commands if "warmstart.kernels" in command] == []
    assert with_features.lines("exact warm-up") == []


def test_the_flag_is_one_of_the_arguments_that_the_server_logs(with_features: Served) -> None:
    assert with_features.logged_flag == ["True"]


def test_it_answers_as_sglang_does_beside_another_plugin(with_features: Served, beside_another_plugin: Served) -> None:
    assert len(with_features.tokens) == TOKENS
    assert with_features.tokens == beside_another_plugin.tokens


@by_plugin
def test_beside_another_plugin_it_is_not_loaded(beside_another_plugin: Served) -> None:
    assert beside_another_plugin.lines("warmstart 0") == []
    assert beside_another_plugin.lines("warmstart:") == []


LAUNCH = """
import runpy, sys
sys.argv[0] = "launch_server.py"
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@on_0_5_12
@by_plugin
@pytest.mark.parametrize("unloaded_by", [{"SGLANG_WARMSTART": "0"}, {"SGLANG_PLUGINS": "another"}], ids=str)
def test_without_the_plugin_the_parser_refuses_the_flag(
    forks: ForkServer, tiny_model: Path, unloaded_by: dict[str, str]
) -> None:
    done = forks.run(LAUNCH, "--model-path", str(tiny_model), FLAG, environment={**NO_SWITCHES, **unloaded_by})
    assert done.status == 2
    assert f"unrecognized arguments: {FLAG}" in done.err


def lanes_of(run: Run, role: str) -> list[Lane]:
    return [lane for lane in run.lanes if lane.process.role == role]


def the(lane: Lane, name: str) -> Event:
    (event,) = [event for event in lane.events if event.name == name]
    return event


@by_plugin
def test_each_process_has_a_lane(run: Run) -> None:
    assert [lane.process.role for lane in run.lanes] == ["main", "rank", "rank"]
    assert [lane.process.labels["pp_rank"] for lane in lanes_of(run, "rank")] == ["0", "1"]
    assert run.unreadable == []


@by_plugin
def test_the_steps_of_a_rank_are_there_and_lie_within_each_other(run: Run) -> None:
    for rank in lanes_of(run, "rank"):
        whole = the(rank, "scheduler")
        for name in ("distributed", "load weights", "attention backend"):
            step = the(rank, name)
            assert whole.at <= step.at
            assert step.at + step.seconds <= whole.at + whole.seconds
        imports = the(rank, "imports")
        assert imports.at == rank.process.started
        assert imports.at + imports.seconds <= whole.at
        assert whole.phase == "startup"


@by_plugin
def test_the_main_process_says_when_the_server_is_ready(run: Run) -> None:
    (main,) = lanes_of(run, "main")
    (ready,) = [event for event in main.events if event.kind == "ready"]
    assert run.ready == ready.at
    warm_up = the(main, "server warm-up")
    assert warm_up.at + warm_up.seconds <= ready.at
    for rank in lanes_of(run, "rank"):
        whole = the(rank, "scheduler")
        assert main.process.started < the(main, "launch").at <= rank.process.started + 0.02  # it counts hundredths
        assert whole.at + whole.seconds < ready.at


@by_plugin
def test_the_servers_metrics_have_ours(with_features: Served) -> None:
    text = with_features.metrics
    assert "sglang:" in text  # its own are there as ever
    # A counter with labels is there once it has counted.
    for name in ("kernels_planned", "kernels_compiled", "kernels_loaded", "kernels_restored"):
        assert f"# TYPE sglang_warmstart_{name}_total counter" in text
        assert f"\nsglang_warmstart_{name}_total 0.0\n" in text


ENGINE = """
import json, sys

import sglang


def main():
    arguments = json.loads(sys.argv[1])
    engine = sglang.Engine(**arguments)
    try:
        sampling = {"max_new_tokens": int(sys.argv[3]), "temperature": 0, "ignore_eos": True}
        answer = engine.generate(input_ids=json.loads(sys.argv[2]), sampling_params=sampling)
        print("answer", json.dumps([answer["output_ids"], engine.server_args.disable_attn_tp_gather]), flush=True)
    finally:
        engine.shutdown()


# The engine's processes import this file again.
if __name__ == "__main__":
    main()
"""


@pytest.mark.release("0.5.12", "0.5.23")  # in between, an engine starts as a server does
def test_an_engine_in_a_program_takes_the_keyword_and_answers_the_same(
    tiny_model: Path, tmp_path: Path, with_features: Served
) -> None:
    program = tmp_path / "program.py"
    program.write_text(ENGINE)
    port, nccl_port = free_ports(2)
    arguments = {
        **cpu_server_args(tiny_model, port, nccl_port),
        "log_level": "info",
        "disable_attn_tp_gather": True,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, json.dumps(arguments), json.dumps(PROMPT), str(TOKENS)],
        env=child_environment({**NO_SWITCHES, "SGLANG_DG_CACHE_DIR": str(tmp_path)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert answers, done.stdout + done.stderr
    tokens, flag = json.loads(answers[0].removeprefix("answer "))
    assert tokens == with_features.tokens
    assert flag is True
    if not is_patched():
        run = read_run(find_run(runs_of(tmp_path)))
        assert run.ready is not None, "an engine is ready when it has been made"
        (rank,) = lanes_of(run, "rank")
        assert max(event.at + event.seconds for event in rank.events if event.phase == "startup") < run.ready


@pytest.mark.skipif(not is_patched(), reason="is about the plugin beside the patches")
def test_beside_the_patches_the_plugin_says_what_is_built_in_and_the_server_answers(
    tiny_model: Path, with_features: Served
) -> None:
    served = serve(tiny_model, FLAG, SGLANG_PLUGINS=None)
    assert served.tokens == with_features.tokens
    said = served.lines(f"on SGLang {installed_release().version}: ")
    assert len(said) == 2, "in the main process, and in the scheduler"
    for line in said:
        built_in = ", ".join(sorted(BY_PATCHES, key=line.index))
        assert line.endswith(f"active: build-ahead, bundle-restore, jit-monitor, start-up-events; built in: {built_in}")


def help_of_launch_server(forks: ForkServer, **environment: str) -> str:
    done = forks.run(LAUNCH, "--help", environment={**NO_SWITCHES, "COLUMNS": "1000", **environment})
    return done.checked()


def options_with_help(text: str) -> dict[str, str]:
    """The options that a help text describes, each with its description."""
    return dict(re.findall(r"^  (--[-\w]+)[^\n]*?\s{2,}(\S.*(?:\n {6,}\S.*)*)", text, re.MULTILINE))


def test_the_help_describes_the_flag_once_and_warns(forks: ForkServer) -> None:
    text = help_of_launch_server(forks)
    assert len(re.findall(rf"^  {FLAG}\b", text, re.MULTILINE)) == 1
    if installed_release().version == "0.5.12":
        assert "results are wrong" in options_with_help(text)[FLAG]


@on_0_5_12
@by_plugin
def test_switched_off_the_help_does_not_know_the_flag(forks: ForkServer) -> None:
    text = help_of_launch_server(forks, SGLANG_WARMSTART="0")
    assert "--model-path" in text
    assert FLAG not in text


SABOTEUR = Path(__file__).parent / "kit" / "saboteur"


@by_plugin
def test_a_server_whose_every_hook_raises_starts_and_answers_as_without_us(
    tiny_model: Path, tmp_path: Path, beside_another_plugin: Served
) -> None:
    reached = tmp_path / "reached"
    path = {"PYTHONPATH": python_path(SABOTEUR), "SABOTAGE": "all", "SABOTAGED": str(reached)}
    served = serve(tiny_model, **path)
    assert served.tokens == beside_another_plugin.tokens
    hooks = set(reached.read_text().splitlines())
    assert len(hooks) >= 12, hooks
    for hook in hooks:
        lines = served.lines(f"warmstart: {hook} failed, SGLang goes on without it: RuntimeError: sabotaged")
        # The main process, the rank, and from 0.5.22 on the detokenizer say it once at the most.
        assert 1 <= len(lines) <= 3, (hook, lines)


@by_plugin
def test_in_strict_mode_a_hook_that_raises_ends_the_start(tiny_model: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": python_path(SABOTEUR), "SABOTAGE": "all", "SABOTAGED": str(tmp_path / "reached")}
    with pytest.raises(RuntimeError, match="RuntimeError: sabotaged"):
        serve(tiny_model, SGLANG_WARMSTART_STRICT="1", **path)
