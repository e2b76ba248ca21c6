"""``sglang-warmstart doctor``: what is installed, the state of each feature, and whether the plugin can work here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from sglang_warmstart import __version__, plugin
from sglang_warmstart.base import trust
from sglang_warmstart.base.errors import first_line, one_line, printable
from sglang_warmstart.base.switches import (
    COMPILER,
    ONLY,
    PLUGIN_NAME,
    PLUGINS,
    SWITCHES,
    WARMSTART,
    Switch,
    left_out_by,
)
from sglang_warmstart.bundle.source import shown
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm.compiler import CompileJob, CompilerError, Kind
from sglang_warmstart.libraries.deep_gemm import installed_dialect
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE, deep_gemm_cache
from sglang_warmstart.sglang.feature import Installation, State
from sglang_warmstart.sglang.features import FEATURES, chosen_features

ENTRY_POINT_GROUP = "sglang.srt.plugins"
CONFIGURER = "sglang.srt.layers.deep_gemm_wrapper.configurer"
# What the kernels of DeepGEMM include that comes with CUDA, and not with DeepGEMM.
SAMPLE = "#include <cuda_bf16.h>\n#include <cuda_fp8.h>\n#include <cuda/std/cstdint>\n__global__ void sample() {}\n"
SAMPLE_LIMIT_S = 60.0
# DeepGEMM has kernels for Hopper and later GPUs.
FIRST_CAPABILITY = 9
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
class Findings:
    """What the doctor found. The plugin can do its work here if there are no ``problems``."""

    warmstart: str = __version__
    python: str = sys.version.split()[0]
    found: list[Found] = field(default_factory=list)
    features: list[FeatureState] = field(default_factory=list)
    switches: list[SwitchValue] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The findings for machines; ``ok`` says what the exit status says."""
        return {"ok": not self.problems, **asdict(self)}


def examine() -> Findings:
    """Look at this environment. Imports SGLang (not its plugins) where it is there."""
    findings = Findings()
    findings.switches = [
        SwitchValue(switch.name, _value_of(switch), switch.shown_default, switch.meaning) for switch in SWITCHES
    ]
    complaints = [*(switch.read(os.environ)[1] for switch in SWITCHES), chosen_features(os.environ)[1]]
    findings.notes += [complaint for complaint in complaints if complaint]
    findings.found = [_find_package(name) for name in _DISTRIBUTIONS]
    findings.found.append(find_compiler())
    _examine_cache(findings)
    _examine_sglang(findings)
    findings.found.append(_find_gpu(findings))
    _examine_entry_point(findings)
    return findings


def _value_of(switch: Switch[Any]) -> str | None:
    value = os.environ.get(switch.name)
    # What the doctor says is shown to others, and a URL may have a password in it.
    return value if value is None else shown(value)


def find_compiler() -> Found:
    """The compiler that DeepGEMM's JIT uses: ``DG_JIT_NVCC_COMPILER``, else nvcc of ``CUDA_HOME``, else of the PATH."""
    name = "CUDA compiler"
    try:
        compiler = compilers.find(os.environ, dialect=installed_dialect())
    except CompilerError as error:
        return Found(name, None, first_line(error))
    return Found(name, compiler.release, compiler.path)


def why_it_cannot_compile(capability: tuple[int, int]) -> str | None:
    """Why the compiler of exact warm-up cannot compile a small kernel for a GPU, in one line; None if it can.

    Args:
        capability: of the GPU: (9, 0) for Hopper.
    """
    flags = f"-std=c++20 --gpu-architecture=sm_{capability[0]}{capability[1]}a"
    try:
        compiler = compilers.find(os.environ, cast(Kind, COMPILER.value(os.environ)), installed_dialect())
        compilers.compile_kernel(CompileJob(SAMPLE, flags, compiler, SAMPLE_LIMIT_S))
    except CompilerError as error:
        return " ".join(str(error).split())
    return None


def _examine_cache(findings: Findings) -> None:
    roots = installed_dialect().roots(os.environ.get(DEEP_GEMM_CACHE) or str(deep_gemm_cache(os.environ)))
    try:
        trust.check_caches(roots, os.environ)
    except trust.UntrustedError as error:
        findings.problems.append(f"exact warm-up and bundles do not use this cache: {error}")


def _find_package(module: str) -> Found:
    for distribution in _DISTRIBUTIONS[module]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Found(module, importlib.metadata.version(distribution))
    return Found(module, None, "not installed")


def _find_gpu(findings: Findings) -> Found:
    try:
        import torch
    except Exception as error:
        return Found("GPU", None, f"cannot be looked for without torch: {first_line(error)}")
    if not torch.cuda.is_available():
        findings.notes.append("no CUDA GPU is visible: the hooks are in place, but there are no kernels to warm")
        return Found("GPU", None, "none visible to torch")
    properties = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    if properties.major >= FIRST_CAPABILITY and _is_jit_wanted():
        why_not = why_it_cannot_compile((properties.major, properties.minor))
        if why_not is not None:
            findings.problems.append(f"DeepGEMM cannot compile kernels here: {why_not}")
    return Found("GPU", properties.name, f"{count} visible, {properties.multi_processor_count} SMs each")


def _is_jit_wanted() -> bool:
    """Whether the environment leaves DeepGEMM's JIT on. Without SGLang there is none that asks."""
    environ = sys.modules.get("sglang.srt.environ")
    return environ is not None and bool(environ.envs.SGLANG_ENABLE_JIT_DEEPGEMM.get())


def _examine_sglang(findings: Findings) -> None:
    if not WARMSTART.value(os.environ):
        findings.problems.append(f"{WARMSTART.name}={os.environ[WARMSTART.name]}: the plugin is switched off")
        findings.features = [FeatureState(each.name, "off", "") for each in FEATURES]
        return
    # SGLang prints as it is imported; standard output is the report's.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("sglang", ENTRY_POINT_GROUP, "sglang.srt.environ", plugin.COMMON):
            try:
                importlib.import_module(module)
            except Exception as error:
                findings.problems.append(_why_not(module, error))
                return
        try:
            plugin.register()
        except SystemExit as error:
            findings.problems.append(f"the server does not start in strict mode: {error}")
            return
        loaded = plugin.loaded_plugin()
        if loaded is None:
            findings.problems.append("the plugin failed to load; the log says why")
            return
        chosen = {each.feature.name: each for each in loaded.installations}
        for feature in FEATURES:
            findings.features.append(
                _examine_feature(findings, chosen[feature.name])
                if feature.name in chosen
                else FeatureState(feature.name, "off", f"{ONLY.name} does not name it")
            )
        _note_deep_gemm(findings)


def _why_not(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "sglang":
        return "SGLang is not installed. Install it: pip install sglang==0.5.12"
    if isinstance(error, ModuleNotFoundError) and error.name == ENTRY_POINT_GROUP:
        return f"this SGLang has no plugin system ({ENTRY_POINT_GROUP}): 0.5.11 or newer is needed"
    return f"{module} cannot be imported: {one_line(error)}"


def _examine_feature(findings: Findings, installation: Installation) -> FeatureState:
    name = installation.feature.name
    for step in installation.steps:
        if installation.state in (State.BUILT_IN, State.STANDS_ASIDE):
            break
        for module in step.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                reason = f"{module} cannot be imported: {first_line(error)}"
                if step.required:
                    findings.problems.append(f"{name}: {reason}")
                    return FeatureState(name, installation.state.value, reason)
                findings.notes.append(f"{name}: {reason} (only some models need it)")
                break
    if installation.state is State.STANDS_ASIDE:
        findings.problems.append(f"{name} stands aside: {installation.detail}")
        return FeatureState(name, installation.state.value, installation.detail)
    if installation.hooks.lacking:
        return FeatureState(name, "partly", "; ".join(installation.hooks.lacking))
    return FeatureState(name, installation.state.value, installation.detail or installation.feature.gains)


def _note_deep_gemm(findings: Findings) -> None:
    configurer = sys.modules.get(CONFIGURER)
    if configurer is not None and not configurer.ENABLE_JIT_DEEPGEMM:
        findings.notes.append(
            "SGLang has DeepGEMM's JIT disabled here (it needs a Hopper or newer GPU, deep_gemm, and "
            "SGLANG_ENABLE_JIT_DEEPGEMM other than 0)"
        )


def _examine_entry_point(findings: Findings) -> None:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if PLUGIN_NAME not in {point.name for point in points}:
        findings.problems.append(
            "SGLang will not find the plugin: no entry point `warmstart` is installed. Install the package with pip"
        )
    left_out = left_out_by(os.environ)
    if left_out is not None:
        built_in = {each.name for each in findings.features if each.state == State.BUILT_IN.value}
        idle = [
            switch.name
            for switch in SWITCHES
            if switch.name in os.environ and switch.feature is not None and switch.feature not in built_in
        ]
        without_effect = f" Set, and without effect: {', '.join(idle)}." if idle else ""
        findings.problems.append(
            f"{PLUGINS.name}={left_out} leaves this plugin out. Add `{PLUGIN_NAME}` to it.{without_effect}"
        )


_COLOURS = {
    State.ACTIVE.value: "green",
    State.BUILT_IN.value: "cyan",
    State.WAITING.value: "yellow",
    "partly": "yellow",
    State.STANDS_ASIDE.value: "red",
    "off": "red",
}


def show(findings: Findings, console: Console) -> None:
    """Print what was found, in lines that any width of a terminal can show. Nothing of it is taken for markup."""
    _heading(console, f"sglang-warmstart {findings.warmstart}")
    _entry(console, Text.assemble("Python ", (findings.python, "bold")))
    for each in findings.found:
        version = (each.version, "bold") if each.version else ("none", "yellow")
        _entry(console, Text.assemble(f"{each.name} ", version), each.note)
    if findings.features:
        _heading(console, "Features")
    for state in findings.features:
        _entry(console, Text.assemble(f"{state.name}: ", (state.state, _COLOURS[state.state])), state.detail)
    _heading(console, "Switches")
    for switch in findings.switches:
        default = (f" (default: {switch.default})", "dim")
        value = default if switch.value is None else (printable(f"={switch.value}"), "bold")
        _entry(console, Text.assemble(switch.name, value), switch.meaning)
    console.print()
    for note in findings.notes:
        console.print(Text(printable(f"note: {note}")))
    for problem in findings.problems:
        console.print(Text(printable(f"problem: {problem}"), style="red"))
    if findings.problems:
        console.print(Text("The plugin cannot do its work here.", style="bold red"))
    else:
        console.print(Text("The plugin can do its work here.", style="bold green"))


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold underline"))


def _entry(console: Console, text: Text, detail: str = "") -> None:
    # A path or a name that is longer than a line goes on in the next one.
    console.print(Padding(text, (0, 0, 0, 2)), overflow="fold")
    if detail:
        console.print(Padding(Text(printable(detail)), (0, 0, 0, 6)), overflow="fold")
