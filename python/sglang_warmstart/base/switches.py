"""All environment variables of the product. Each is declared and parsed here, and nowhere else.

A variable that is set but empty, as templates often leave it, counts as not set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sglang_warmstart.base.errors import printable

T = TypeVar("T")

PLUGIN_NAME = "warmstart"

# Set by a process of ours for those that it starts, and by nobody else.
SERVICE = "SGLANG_WARMSTART_SERVICE"  # the socket of the node's service
EARLY = "SGLANG_WARMSTART_EARLY"  # whose that service is, where `sglang-warmstart run` has started it
RESTORING = "SGLANG_WARMSTART_RESTORING"  # a file that is locked while kernels are restored into the cache
PLANS = "SGLANG_WARMSTART_PLANS"  # where `sglang-warmstart record` wants the plans of the ranks
IMAGE = "SGLANG_WARMSTART_IMAGE"  # set where `sglang-warmstart compile` fills caches for a container image
EVENTS = "SGLANG_WARMSTART_EVENTS"  # the directory of the run
UNWATCHED = "SGLANG_WARMSTART_UNWATCHED"  # what DG_JIT_NVCC_COMPILER was before the monitor's command came before it
METRICS = "SGLANG_WARMSTART_METRICS"  # set where SGLang collects metrics: each process counts its events
# For whoever looks for a fault: commands show the traceback of an error that they do not expect.
DEBUG = "SGLANG_WARMSTART_DEBUG"

_WORDS = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}


@dataclass(frozen=True)
class Switch(Generic[T]):
    """An environment variable that a user sets.

    Args:
        name: of the variable.
        default: the value where it is not set.
        parse: the value of a word. Raises ValueError, which says what the word is not.
        meaning: what it is for, in one line.
        feature: the feature that it switches; empty for the plugin as a whole, None for a switch of SGLang's own.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    meaning: str
    feature: str | None = ""

    def read(self, environment: Mapping[str, str]) -> tuple[T, str | None]:
        """The value in an environment, and what is wrong with its word, in one line, where the default is used."""
        word = environment.get(self.name)
        if not word:
            return self.default, None
        try:
            return self.parse(word), None
        except ValueError as error:
            default = f"using the default {self.shown_default}".rstrip()
            return self.default, printable(f'{self.name}: "{word}" is not {error}, {default}')

    def value(self, environment: Mapping[str, str]) -> T:
        """The value in an environment."""
        return self.read(environment)[0]

    @property
    def shown_default(self) -> str:
        """The default, as a user would write it."""
        if isinstance(self.default, bool):
            return "1" if self.default else "0"
        return str(self.default or "")


def boolean(word: str) -> bool:
    """By the words that SGLang's own ``EnvBool`` takes.

    Raises:
        ValueError: it is another one.
    """
    if word.lower() not in _WORDS:
        raise ValueError("a valid boolean value")
    return _WORDS[word.lower()]


def number_above_0(word: str) -> int:
    """A number above 0.

    Raises:
        ValueError: it is none.
    """
    if not (word.isdecimal() and len(word) < 10 and int(word) > 0):
        raise ValueError("a number above 0")
    return int(word)


def one_of(*words: str) -> Callable[[str], str]:
    """A parser that takes one of ``words``."""

    def parse(word: str) -> str:
        if word not in words:
            raise ValueError(" or ".join(words))
        return word

    return parse


def names(word: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in word.split(",") if name.strip())


WARMSTART = Switch("SGLANG_WARMSTART", True, boolean, "0 leaves SGLang exactly as it is, whatever else is set")
STRICT = Switch(
    "SGLANG_WARMSTART_STRICT",
    False,
    boolean,
    "a target that cannot be warmed stops the start-up instead of warning",
)
PP_PARALLEL = Switch(
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
    False,
    boolean,
    "every pipeline rank warms its own kernels at the same time",
    "pp-parallel-warmup",
)
FAST_WARMUP = Switch(
    "SGLANG_JIT_DEEPGEMM_FAST_WARMUP", False, boolean, "DeepGEMM's warm-up runs a sampled list of Ms", None
)
ENABLE = Switch("SGLANG_ENABLE_JIT_DEEPGEMM", True, boolean, "0 leaves DeepGEMM out, and exact warm-up with it", None)
PRECOMPILE = Switch(
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE", True, boolean, "0 turns DeepGEMM's warm-up off, and exact warm-up with it", None
)
WORKERS: Switch[int | None] = Switch(
    "SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS",
    None,  # SGLang has a default of 4, which is nobody's wish
    number_above_0,
    "kernels that a node compiles at once; by default, one per core and per GiB of free memory",
    None,
)
COMPILER = Switch(
    "SGLANG_WARMSTART_COMPILER",
    "nvcc",
    one_of("nvcc", "nvrtc"),
    "nvrtc compiles kernels by NVRTC, into a cache of their own",
    "exact-warmup",
)
SHARED_CACHE = Switch(
    "SGLANG_WARMSTART_SHARED_CACHE",
    False,
    boolean,
    "1 trusts a kernel cache that other users can write: they can run code in the server",
)
BUILD_AHEAD = Switch(
    "SGLANG_WARMSTART_BUILD_AHEAD",
    True,
    boolean,
    "0 leaves what other JIT compilers than DeepGEMM's compile to the process that calls it, one after another",
    "build-ahead",
)
BUNDLE: Switch[str | None] = Switch(
    "SGLANG_WARMSTART_BUNDLE",
    None,
    str,
    "a bundle (path or URL) that is restored into the node's caches while weights load",
    "bundle-restore",
)
BUNDLE_KEY: Switch[str | None] = Switch(
    "SGLANG_WARMSTART_BUNDLE_KEY",
    None,
    str,
    "an Ed25519 public key (PEM) that must have signed the bundle, else it is not restored",
    "bundle-restore",
)
JIT_MONITOR = Switch(
    "SGLANG_WARMSTART_JIT_MONITOR",
    "warn",
    one_of("warn", "error", "off"),
    "a kernel that is compiled while serving is reported (warn), makes its call fail (error), or is not watched (off)",
    "jit-monitor",
)
ONLY: Switch[tuple[str, ...]] = Switch(
    "SGLANG_WARMSTART_ONLY",
    (),
    names,
    "the features to install, with commas; jit-monitor,start-up-events watch a server that is otherwise SGLang's own",
)
PLUGINS: Switch[tuple[str, ...]] = Switch(
    "SGLANG_PLUGINS", (), names, "SGLang's own list of plugins to load; empty loads all of them", None
)

SWITCHES: tuple[Switch[Any], ...] = (
    WARMSTART,
    ONLY,
    STRICT,
    PP_PARALLEL,
    FAST_WARMUP,
    ENABLE,
    PRECOMPILE,
    WORKERS,
    COMPILER,
    SHARED_CACHE,
    BUILD_AHEAD,
    BUNDLE,
    BUNDLE_KEY,
    JIT_MONITOR,
    PLUGINS,
)


def left_out_by(environment: Mapping[str, str]) -> str | None:
    """The value of ``SGLANG_PLUGINS`` if it keeps SGLang from loading this plugin, else None.

    Any value but the empty one is a list for SGLang, also one that names nothing.
    """
    word = environment.get(PLUGINS.name, "")
    return word if word and PLUGIN_NAME not in names(word) else None
