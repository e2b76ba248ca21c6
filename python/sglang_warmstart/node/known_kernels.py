"""The kernels of a plan's targets, compiled before DeepGEMM itself has said again which they are.

To ask it, torch and DeepGEMM have to be imported, and meanwhile most cores idle. So a plan has the sources that
DeepGEMM gave to its compiler. They hold where the same build of it, the same compiler and the same GPU are (its
identity): else they are left aside. DeepGEMM is asked in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from sglang_warmstart.deepgemm.dialects import named
from sglang_warmstart.deepgemm.flags import unknown_option
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.libraries.anchors import NoAnchorError, anchored, anchors_of, placed
from sglang_warmstart.node.protocol import Hello


class Known(msgspec.Struct, frozen=True):
    """The kernels of a target.

    Args:
        identity: the digest of what they were recorded with.
        kernels: as they were recorded; paths in their flags by anchors.
    """

    identity: str
    kernels: tuple[RecordedKernel, ...]


def known_of(kernels: Sequence[RecordedKernel], hello: Hello, identity: Identity) -> Known | None:
    """What a plan is to have of recorded kernels; None if they cannot be written down."""
    anchors = anchors_of(Path(hello.cache), hello.environment)
    try:
        described = (msgspec.structs.replace(each, flags=anchored(each.flags, anchors)) for each in kernels)
        return Known(identity.digest, tuple(described)) if kernels else None
    except NoAnchorError:
        return None


def kernels_here(known: Known | None, hello: Hello, identity: Identity) -> list[RecordedKernel]:
    """The kernels as DeepGEMM would ask for them here; none if it may ask for others."""
    if known is None or known.identity != identity.digest:
        return []
    anchors, dialect = anchors_of(Path(hello.cache), hello.environment), named(identity.jit)
    found, include = [], str(Path(hello.deep_gemm, "include"))
    for each in known.kernels:
        try:
            flags = placed(each.flags, anchors)
            directory = dialect.directory_of(each.directory, identity.compiler, flags, each.source)
        except (NoAnchorError, ValueError):  # by whoever has changed the plan
            continue
        if unknown_option(flags, include) is not None:
            continue
        found.append(RecordedKernel(directory, each.source, flags, each.m))
    return found
