"""The launch of a rank: everything that may decide which GEMMs it calls. It is the key of the rank's marker.

A list of what decides would be wrong as soon as SGLang adds an argument. So the key has every argument that is not at
its default and every ``SGLANG_*`` variable that is set, except those listed here, which are known not to matter. If a
name is missing from these lists, one more start runs the dry forwards. If a list has a name too many, the marker of
another server answers, and the targets that it lacks are compiled inside forwards. So when in doubt, leave the name
out.

The key never has a secret, anything that SGLang draws at random, or a place on one machine, because plans and bundles
carry it to other machines. In place of the paths of models it has a hash of each configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.sglang.arguments import defaults
from sglang_warmstart.sglang.exact_warmup.immaterial import IMMATERIAL_ARGUMENTS, is_material
from sglang_warmstart.sglang.seams import seam

# Said also where they are 1: people tell ranks apart by them.
_SIZES = ("tp_size", "pp_size", "ep_size")

# In a model's configuration: where it lies, and the tool that read it.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def launch_of(server_args: Any, rank: int, environment: Mapping[str, str]) -> Launch:
    """The launch of a rank: strings by name, the same ones at each start of the same server.

    Args:
        server_args: SGLang's.
        rank: of the server's world.
        environment: of the rank.
    """
    import sglang

    arguments, usual = seam().decided(server_args), defaults(type(server_args))
    launch = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=_stable)
        for name, value in arguments.items()
        if name not in IMMATERIAL_ARGUMENTS
        and not name.startswith("_")
        and (name in _SIZES or name not in usual or value != usual[name])
    }
    launch |= {name: value for name, value in environment.items() if value and is_material(name)}
    launch |= {"rank": str(rank), "sglang": str(sglang.__version__)}
    if hasattr(server_args, "get_model_config"):
        launch["config"] = _hash(json.loads(server_args.get_model_config().hf_config.to_json_string()))
    if draft := arguments.get("speculative_draft_model_path"):
        config = Path(draft, "config.json")
        launch["draft_config"] = _hash(json.loads(config.read_text())) if config.is_file() else str(draft)
    return launch


def _hash(config: dict[str, Any]) -> str:
    said = {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _stable(value: object) -> object:
    """What JSON has no form for. An object's own text may have its address."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else type(value).__qualname__
