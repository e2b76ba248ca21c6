"""What to build at the first start of a launch, of which no plan is known: what starts like it have compiled.

There is a list for each release that was started on a GPU, in groups: what any start compiles, and what belongs to a
feature of the model or its arguments. All other releases have one list. A wrong guess costs CPU time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.base.gpus import capabilities
from sglang_warmstart.libraries import build_plan, machine
from sglang_warmstart.libraries.build_plan import BuildPlan, Part
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.sglang.ahead import Known, arguments_of, options_of

LISTS = Path(__file__).with_name("first_starts")
# TileLang's functions are long, and much alike.
SUFFIX = ".json.zst"
# SGLang's own kernels change from release to release, and FlashInfer's do not.
_OTHERS = "other"

# Not imported: this process finds nothing out.
_FINDER = "sglang_warmstart.sglang.targets_ahead"

# Options, and their defaults.
_OF_NODE = (("nnodes", "1"), ("node_rank", "0"))

# What says in a model's configuration that it has a mixture of experts.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


class FirstStarts(msgspec.Struct, frozen=True):
    """What starts of a release have compiled.

    Args:
        capability: of the GPU, as "9.0".
        libraries: version of each whose recipes hold for that alone.
        groups: recipes, by feature.
    """

    capability: str
    libraries: dict[str, str]
    groups: dict[str, tuple[Recipe, ...]]

    def plan(self, features: Iterable[str]) -> BuildPlan:
        """The plan of a start with these features."""
        found: dict[str, list[Recipe]] = {}
        for feature in features:
            for recipe in self.groups.get(feature, ()):
                found.setdefault(recipe.library, []).append(recipe)
        versions = {library: {library: self.libraries[library]} for library in found if library in self.libraries}
        return BuildPlan(
            {library: Part(versions.get(library, {}), self.capability, tuple(each)) for library, each in found.items()}
        )


def known_of_first(directory: Path, command: Sequence[str], environment: Mapping[str, str]) -> Known:
    """What is known of a first start, if it is that of a server on the GPUs of this machine.

    Args:
        directory: for files of guesses.

    Raises:
        OSError: they cannot be written.
    """
    features, gpus = Features(command, environment), capabilities()
    if not features.are_of_a_server or not gpus:
        return {}
    # As one word: a program that has a server's arguments would be taken for one.
    finder = (_FINDER, json.dumps(list(command)))
    guesses = write_guesses(directory, features, gpus)
    return {"finder": finder} if guesses is None else {"finder": finder, "guesses": guesses.absolute()}


def write_guesses(directory: Path, features: Features, gpus: Collection[tuple[int, int]]) -> Path | None:
    """Write what a first start may compile, if the list of the installed release is for this machine's GPUs.

    Launches that are alike have one file.

    Args:
        directory: for it.
        gpus: their compute capabilities.

    Returns:
        The file, a plan; None if nothing is known.

    Raises:
        OSError: it cannot be written.
    """
    known = of_release(machine.version("sglang"))
    if {"{}.{}".format(*each) for each in gpus} != {known.capability}:
        return None
    plan = known.plan(features.all)
    if not plan.parts:
        return None
    data = build_plan.encode(plan)
    path = directory / f"guesses-{hashlib.sha256(data).hexdigest()[:16]}.json"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return path


def of_release(release: str) -> FirstStarts:
    """The list of a release, or of those of which no start was recorded."""
    path = LISTS / f"{release}{SUFFIX}"
    data = (path if path.is_file() else LISTS / f"{_OTHERS}{SUFFIX}").read_bytes()
    return msgspec.json.decode(zstandard.decompress(data), type=FirstStarts)


class Features:
    """What a command line and the model's configuration say of a launch.

    Args:
        command: that starts a server, or that server's ``sys.argv``.
        environment: of the command.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._words = arguments_of(command) or []
        self._options = options_of(self._words)
        self._environment = environment

    @property
    def are_of_a_server(self) -> bool:
        """Whether the words start a server on a GPU, and not its help."""
        return not {"-h", "--help"} & set(self._words) and self._options.get("device", ["cuda"])[-1:] == ["cuda"]

    @property
    def all(self) -> list[str]:
        """Names of groups."""
        config = self.config
        architectures = config.get("architectures")
        architectures = architectures if isinstance(architectures, list) else []
        found = ["any", *architectures]
        # TileLang's kernels are made for one size.
        found += (
            f"{architecture} {config['hidden_size']}" for architecture in architectures if "hidden_size" in config
        )
        if config.get("kv_lora_rank"):
            found.append("mla")
        if any(config.get(name) for name in _EXPERTS):
            found.append("moe")
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
            found.append("fp8")
        # Without the option, SGLang chooses, by much else.
        found += (f"attention-{backend}" for backend in self._options.get("attention_backend", ())[-1:])
        return found

    @property
    def arguments(self) -> list[str]:
        """The server's, with the model by its directory on this machine; none where it is not there."""
        place, _ = self._model
        return [] if place is None else [*self._words, "--model-path", str(place)]

    def ranks_of_node(self, world: int) -> range:
        """Those of so many ranks that are on this node. Source: ``_calculate_rank_ranges`` in ``engine.py``."""
        nodes, node = (int(self._options.get(name, [default])[-1]) for name, default in _OF_NODE)
        return range(world * node // nodes, world * (node + 1) // nodes)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration; empty where it is not on this machine."""
        _, config = self._model
        return config

    @cached_property
    def _model(self) -> tuple[Path | None, dict[str, Any]]:
        words = self._options.get("model_path") or self._options.get("model") or [""]
        for path in (Path(words[-1], "config.json"), *self._in_hub(words[-1])):
            try:
                found = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            return path.parent, found if isinstance(found, dict) else {}
        return None, {}

    def _in_hub(self, model: str) -> list[Path]:
        """Where Hugging Face's cache has it, the newest first (``huggingface_hub/constants.py``)."""
        home = self._environment.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111
        hub = Path(self._environment.get("HF_HUB_CACHE") or Path(home, "hub"))
        found = hub.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json") if model else ()
        return [path for _, path in sorted(_with_times(found), reverse=True)]


def _with_times(paths: Iterable[Path]) -> Iterator[tuple[float, Path]]:
    for path in paths:
        with suppress(OSError):  # a link into blobs that are gone
            yield path.stat().st_mtime, path
