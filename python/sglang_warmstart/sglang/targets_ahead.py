"""The targets of a first start, found while the server still imports SGLang, by a process that the service starts.

No marker and no plan says which GEMMs the ranks will call, and their dry forwards come after the weights. SGLang's own
classes say the same without a GPU (:mod:`.model_targets`). What they say too much costs CPU time; what they do not say,
or say wrongly, the ranks ask for.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_warmstart.base import gpus
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.base.switches import ENABLE, PRECOMPILE, WARMSTART
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.deepgemm.nogpu.devices import gpu_called
from sglang_warmstart.node.client import ServiceClient
from sglang_warmstart.sglang.exact_warmup.introduction import hello_of
from sglang_warmstart.sglang.first_start import Features
from sglang_warmstart.sglang.model_targets.ask import ranks_of
from sglang_warmstart.sglang.model_targets.refusal import RefusalError

# To import SGLang and build models without weights: some 20 s. Nobody waits for it.
LIMIT_S = 300.0
# SGLang's own would be read by importing it, which takes seconds.
_SWITCHES = (WARMSTART, ENABLE, PRECOMPILE)
# Before what is compiled meanwhile, and behind the server.
_NICE = 2
# No rank has this launch, and nothing is kept for it.
_LAUNCH: Launch = {"found": "before the ranks"}

logger = logging.getLogger("sglang.warmstart.finder")


def find(service: Path, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Tell the service which targets the ranks of a server will ask for.

    Args:
        service: its socket.
        command: that starts the server, or that server's ``sys.argv``.
        environment: of the server.

    Returns:
        How many targets.

    Raises:
        RefusalError: it cannot be said.
        ServiceGoneError: the service is.
    """
    names = gpus.names()
    gpu = gpu_called(*names) if len(names) == 1 else None
    package = importlib.util.find_spec("deep_gemm")
    features = Features(command, environment)
    arguments = features.arguments
    if gpu is None:
        several = f"there are several kinds of GPUs: {', '.join(sorted(names))}"
        one = f"there is no table of {next(iter(names), '')}"
        raise RefusalError("NVML names no GPU" if not names else one if len(names) == 1 else several)
    if package is None or package.origin is None or not all(each.value(environment) for each in _SWITCHES):
        raise RefusalError("DeepGEMM is not warmed here")
    if not arguments:
        raise RefusalError("the model's config.json is not on this machine")
    client, found = ServiceClient(service), 0
    ranks = ranks_of(arguments, gpu)
    own = features.ranks_of_node(sum(len(each.ranks) for each in ranks))
    for each in ranks:
        if not set(own).intersection(each.ranks):
            continue
        hello, _ = hello_of({**environment, **each.settings}, Path(package.origin).parent, gpu, _LAUNCH)
        client.expect(hello, each.targets)
        found += len(each.targets)
    return found


def main() -> None:
    """Entry point: the number of the service's process, its socket, and the command as a JSON list."""
    parent, service, command = sys.argv[1:]
    end_with(int(parent), limit_s=LIMIT_S)
    os.nice(_NICE)
    logging.basicConfig(format="[%(asctime)s] warmstart: %(message)s", level=logging.INFO)
    try:
        found = find(Path(service), json.loads(command), os.environ)
    except Exception as error:
        # Whatever the model or the installation is like, the ranks find out.
        logger.info("targets are not known before the ranks: %s", first_line(error))
    else:
        logger.info("%d targets of DeepGEMM are known before the ranks", found)
