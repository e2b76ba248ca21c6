"""``sglang-warmstart doctor``: what is installed here, what each feature makes of it, and whether that is enough."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from sglang_warmstart import __version__, plugin
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.switches import (
    ONLY,
    PLUGIN_NAME,
    PLUGINS,
    SWITCHES,
    WARMSTART,
    Switch,
    complaint_about,
    is_on,
    left_out_by,
)
from sglang_warmstart.bundle.source import shown
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.sglang.feature import Installation, State
from sglang_warmstart.sglang.features import FEATURES, chosen_features

ENTRY_POINT_GROUP = "sglang.srt.plugins"
CONFIGURER = "sglang.srt.layers.deep_gemm_wrapper.configurer"
# The distributions that may bring a module, in the order of preference.
_DISTRIBUTIONS = {
    "sglang": ("sglang",),
    "torch": ("torch",),
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
    "flashinfer": ("flashinfer-python",),
}


@dataclass(frozen=True)
class Found:
    """One thing that was looked for. ``version`` is None where it is not there."""

    name: str
    version: str | None
    note: str = ""


@dataclass(frozen=True)
class FeatureState:
    """One feature as it stands in a process of this environment."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class SwitchValue:
    """One switch, what the environment says, and what it is for. ``value`` is None where it is not set."""

    name: str
    value: str | None
    default: str
    meaning: str


@dataclass
class Report:
    """What the doctor found. The plugin can do its work here if there are no ``problems``."""

    warmstart: str = __version__
    python: str = sys.version.split()[0]
    found: list[Found] = field(default_factory=list)
    features: list[FeatureState] = field(default_factory=list)
    switches: list[SwitchValue] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report for machines; ``ok`` says what the exit status says."""
        return {"ok": not self.problems, **asdict(self)}


def examine() -> Report:
    """Look at this environment. Imports SGLang (not its plugins) where it is there."""
    report = Report()
    report.switches = [
        SwitchValue(switch.name, _value_of(switch), switch.default, switch.meaning) for switch in SWITCHES
    ]
    complaints = [*(complaint_about(switch, os.environ) for switch in SWITCHES), chosen_features(os.environ)[1]]
    report.notes += [complaint for complaint in complaints if complaint]
    report.found = [_find_package(name) for name in _DISTRIBUTIONS]
    report.found.append(find_compiler())
    _examine_sglang(report)
    report.found.append(_find_gpu(report))
    _examine_entry_point(report)
    return report


def _value_of(switch: Switch) -> str | None:
    value = os.environ.get(switch.name)
    # What the doctor says is shown to others, and a URL may have a password in it.
    return value if value is None else shown(value)


def find_compiler() -> Found:
    """The compiler that DeepGEMM's JIT uses: ``DG_JIT_NVCC_COMPILER``, else nvcc of ``CUDA_HOME``, else of the PATH."""
    name = "CUDA compiler"
    try:
        compiler = compilers.find(os.environ)
    except compilers.CompilerError as error:
        return Found(name, None, str(error))
    return Found(name, compiler.release, compiler.path)


def _find_package(module: str) -> Found:
    for distribution in _DISTRIBUTIONS[module]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Found(module, importlib.metadata.version(distribution))
    return Found(module, None, "not installed")


def _find_gpu(report: Report) -> Found:
    try:
        import torch
    except Exception as error:
        return Found("GPU", None, f"cannot be looked for without torch: {first_line(error)}")
    if not torch.cuda.is_available():
        report.notes.append("no CUDA GPU is visible: hooks are in place, there are no kernels to warm")
        return Found("GPU", None, "none visible to torch")
    properties = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    compiler = next(each for each in report.found if each.name == "CUDA compiler")
    if compiler.version is None:
        report.notes.append(f"DeepGEMM cannot compile kernels here: {compiler.note}")
    return Found("GPU", properties.name, f"{count} visible, {properties.multi_processor_count} SMs each")


def _examine_sglang(report: Report) -> None:
    on, _ = is_on(WARMSTART, os.environ)
    if not on:
        report.problems.append(f"{WARMSTART.name}={os.environ[WARMSTART.name]}: the plugin is switched off")
        report.features = [FeatureState(each.name, "off", "") for each in FEATURES]
        return
    # SGLang prints as it is imported; standard output is the report's.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("sglang", ENTRY_POINT_GROUP, "sglang.srt.environ", plugin.COMMON):
            try:
                importlib.import_module(module)
            except Exception as error:
                report.problems.append(_why_not(module, error))
                return
        plugin.register()
        loaded = plugin.loaded_plugin()
        assert loaded is not None  # it is on, and register() has just run
        chosen = {each.feature.name: each for each in loaded.installations}
        for feature in FEATURES:
            report.features.append(
                _examine_feature(report, chosen[feature.name])
                if feature.name in chosen
                else FeatureState(feature.name, "off", f"{ONLY.name} does not name it")
            )
        _note_deep_gemm(report)


def _why_not(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "sglang":
        return "SGLang is not installed. Install it: pip install sglang==0.5.12"
    if isinstance(error, ModuleNotFoundError) and error.name == ENTRY_POINT_GROUP:
        return f"this SGLang has no plugin system ({ENTRY_POINT_GROUP}): 0.5.11 or newer is needed"
    return f"{module} cannot be imported: {type(error).__name__}: {first_line(error)}"


def _examine_feature(report: Report, installation: Installation) -> FeatureState:
    name = installation.feature.name
    for step in installation.feature.steps:
        if installation.state in (State.BUILT_IN, State.STANDS_ASIDE):
            break
        for module in step.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                reason = f"{module} cannot be imported: {first_line(error)}"
                if step.required:
                    report.problems.append(f"{name}: {reason}")
                    return FeatureState(name, installation.state.value, reason)
                report.notes.append(f"{name}: {reason} (only some models need it)")
                break
    if installation.state is State.STANDS_ASIDE:
        report.problems.append(f"{name} stands aside: {installation.detail}")
    return FeatureState(name, installation.state.value, installation.detail or installation.feature.gains)


def _note_deep_gemm(report: Report) -> None:
    configurer = sys.modules.get(CONFIGURER)
    if configurer is not None and not configurer.ENABLE_JIT_DEEPGEMM:
        report.notes.append(
            "SGLang has DeepGEMM's JIT disabled here (it takes a Hopper or newer GPU, deep_gemm, and "
            "SGLANG_ENABLE_JIT_DEEPGEMM not 0)"
        )


def _examine_entry_point(report: Report) -> None:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if PLUGIN_NAME not in {point.name for point in points}:
        report.problems.append(
            "SGLang will not find the plugin: no entry point `warmstart` is installed. Install the package with pip"
        )
    left_out = left_out_by(os.environ)
    if left_out is not None:
        built_in = {each.name for each in report.features if each.state == State.BUILT_IN.value}
        idle = [
            switch.name
            for switch in SWITCHES
            if switch.name in os.environ and switch.feature is not None and switch.feature not in built_in
        ]
        without_effect = f" Set, and without effect: {', '.join(idle)}." if idle else ""
        report.problems.append(
            f"{PLUGINS.name}={left_out} leaves this plugin out. Add `{PLUGIN_NAME}` to it.{without_effect}"
        )


_COLOURS = {
    State.ACTIVE.value: "green",
    State.BUILT_IN.value: "cyan",
    State.WAITING.value: "yellow",
    State.STANDS_ASIDE.value: "red",
    "off": "red",
}


def show(report: Report, console: Console) -> None:
    """Print the report as tables."""
    found = Table(
        "Found here",
        "Version",
        Column("", overflow="fold"),
        title=f"sglang-warmstart {report.warmstart}",
        title_justify="left",
    )
    found.add_row("Python", report.python, "")
    for each in report.found:
        found.add_row(each.name, each.version or "[yellow]none[/]", each.note)
    console.print(found)
    if report.features:
        features = Table(Column("Feature", no_wrap=True), "State", Column("", overflow="fold"))
        for state in report.features:
            features.add_row(state.name, f"[{_COLOURS[state.state]}]{state.state}[/]", state.detail)
        console.print(features)
    switches = Table(Column("Switch", no_wrap=True), Column("Value", overflow="fold"), "Meaning")
    for switch in report.switches:
        value = f"[bold]{switch.value}[/]" if switch.value is not None else f"[dim]{switch.default or '(empty)'}[/]"
        switches.add_row(switch.name, value, switch.meaning)
    console.print(switches)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    if report.problems:
        console.print("The plugin cannot do its work here.", style="bold red")
    else:
        console.print("The plugin can do its work here.", style="bold green")
