"""What the process that builds the model is asked, and what it says: lines of JSON."""

from __future__ import annotations

import msgspec

from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import Target


class Question(msgspec.Struct, frozen=True):
    """Which targets a server has.

    Args:
        gpu: that it will run on.
        arguments: the server's command line.
    """

    gpu: Gpu
    arguments: tuple[str, ...]


class Begun(msgspec.Struct, frozen=True, tag="step"):
    """Something has begun, in a few words."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There is no answer, and why, in one line."""

    reason: str


class NotFound(msgspec.Struct, frozen=True, order=True):
    """A part of the model whose targets are not known.

    Args:
        module: its name in the model.
        reason: why they are not, in one line.
    """

    module: str
    reason: str


class Ranks(msgspec.Struct, frozen=True, tag="ranks"):
    """What some ranks of the server call.

    Args:
        ranks: numbers of ranks that are alike.
        models: the classes of their models.
        layers: how many layers were called.
        targets: in the order of their calls.
        not_found: what may have more.
        settings: variables of DeepGEMM, of which SGLang sets some.
    """

    ranks: tuple[int, ...]
    models: tuple[str, ...]
    layers: int
    targets: tuple[Target, ...]
    not_found: tuple[NotFound, ...]
    settings: dict[str, str] = {}


Answer = Begun | Refused | Ranks
