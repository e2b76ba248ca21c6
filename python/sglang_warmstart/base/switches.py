"""The switches of the product, as data: the plugin declares them, ``doctor`` and the docs show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sglang_warmstart.base.settings import number_above_0, one_of


@dataclass(frozen=True)
class Switch:
    """An environment variable that the plugin reads or whose meaning it changes."""

    name: str
    default: str
    meaning: str
    # The feature that it switches; empty for the plugin as a whole, None for a switch that is SGLang's own.
    feature: str | None = ""
    # What it takes: a boolean word, or any other that ``check`` knows.
    kind: Literal["boolean", "number", "nvcc or nvrtc", "warn or error or off", "features", "list", "text"] = "boolean"


WARMSTART = Switch("SGLANG_WARMSTART", "1", "0 leaves SGLang exactly as it is, whatever else is set")
STRICT = Switch("SGLANG_WARMSTART_STRICT", "0", "a target that cannot be warmed stops the start-up instead of warning")
PP_PARALLEL = Switch(
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
    "0",
    "every pipeline rank warms its own kernels at the same time",
    "pp-parallel-warmup",
)
FAST_WARMUP = Switch("SGLANG_JIT_DEEPGEMM_FAST_WARMUP", "0", "DeepGEMM's warm-up runs a sampled list of Ms", None)
PRECOMPILE = Switch(
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE", "1", "0 turns DeepGEMM's warm-up off, and exact warm-up with it", None
)
WORKERS = Switch(
    "SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS",
    "",
    "kernels that a node compiles at once; by default, one per core and per GiB of free memory",
    None,
    "number",
)
COMPILER = Switch(
    "SGLANG_WARMSTART_COMPILER",
    "nvcc",
    "nvrtc compiles kernels by NVRTC, into a cache of their own",
    "exact-warmup",
    "nvcc or nvrtc",
)
BUNDLE = Switch(
    "SGLANG_WARMSTART_BUNDLE",
    "",
    "a bundle (path or URL) that is restored into the node's caches while weights load",
    "bundle-restore",
    "text",
)
BUNDLE_KEY = Switch(
    "SGLANG_WARMSTART_BUNDLE_KEY",
    "",
    "an Ed25519 public key (PEM) that must have signed the bundle, else it is not restored",
    "bundle-restore",
    "text",
)
JIT_MONITOR = Switch(
    "SGLANG_WARMSTART_JIT_MONITOR",
    "warn",
    "a kernel that is compiled while serving is reported (warn), makes its call fail (error), or is not watched (off)",
    "jit-monitor",
    "warn or error or off",
)
ONLY = Switch(
    "SGLANG_WARMSTART_ONLY",
    "",
    "the features to install, with commas; jit-monitor,start-up-events watch a server that is otherwise SGLang's own",
    "",
    "features",
)
PLUGINS = Switch("SGLANG_PLUGINS", "", "SGLang's own list of plugins to load; empty loads all of them", None, "list")

SWITCHES = (
    WARMSTART,
    ONLY,
    STRICT,
    PP_PARALLEL,
    FAST_WARMUP,
    PRECOMPILE,
    WORKERS,
    COMPILER,
    BUNDLE,
    BUNDLE_KEY,
    JIT_MONITOR,
    PLUGINS,
)

PLUGIN_NAME = "warmstart"

_WORDS = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}


def is_on(switch: Switch, environment: Mapping[str, str]) -> tuple[bool, str | None]:
    """The value of a boolean switch, by the words that SGLang's own ``EnvBool`` takes.

    Returns:
        The value, and a complaint (one line, names the switch) where the word is unknown and the default is used.
    """
    word = environment.get(switch.name)
    if word is None:
        return _WORDS[switch.default], None
    value = _WORDS.get(word.lower())
    if value is None:
        complaint = f'{switch.name}: "{word}" is not a valid boolean value, using the default {switch.default}'
        return _WORDS[switch.default], complaint
    return value, None


def complaint_about(switch: Switch, environment: Mapping[str, str]) -> str | None:
    """What is wrong with the value of a switch, in one line that names it, or None."""
    if switch.kind in ("list", "text", "features"):
        return None
    if switch.kind == "boolean":
        return is_on(switch, environment)[1]
    if switch.kind == "number":
        return number_above_0(switch.name, environment)[1]
    return one_of(switch.name, switch.kind.split(" or "), environment)[1]


def left_out_by(environment: Mapping[str, str]) -> str | None:
    """The value of ``SGLANG_PLUGINS`` if it keeps SGLang from loading this plugin, else None.

    Any value but the empty one is a list for SGLang, also one that names nothing.
    """
    value = environment.get(PLUGINS.name, "")
    names = {name.strip() for name in value.split(",")}
    return value if value and PLUGIN_NAME not in names else None
