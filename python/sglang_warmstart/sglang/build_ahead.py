"""F7: what other libraries than DeepGEMM compile is built before a rank comes to it, by the plan of an earlier start.

What a rank's libraries compile, the JIT monitor's hooks write down as recipes (:mod:`..libraries.recipe`). Each goes to
the node's service, which keeps them beside DeepGEMM's kernels, and builds them at the next start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import BUILD_AHEAD, BUNDLE, EVENTS, JIT_MONITOR, METRICS, PLANS, SERVICE
from sglang_warmstart.libraries import recipe as recipes
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.sglang.ahead import known_of, plan_for
from sglang_warmstart.sglang.caches import deep_gemm_cache, server_environment
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.ranks import ENGINE, LAUNCH, before_the_ranks
from sglang_warmstart.sglang.triton_cache import TRITON_CACHE, install_one_place

# Where the events of this run go.
_RUN = (EVENTS, METRICS, "PROMETHEUS_MULTIPROC_DIR")
# The service has been started just before.
ANSWER_S = 5.0

logger = logging.getLogger(LOGGER_NAME)


class Teller:
    """Tells the service what this process has had compiled. Nobody waits for it.

    Args:
        limit: of recipes that wait to be told. More are not told.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._waiting: queue.Queue[Recipe] = queue.Queue(limit)
        self._begun = False
        self._lock = threading.Lock()

    def __call__(self, recipe: Recipe) -> None:
        if SERVICE in os.environ:
            with self._lock:
                if not self._begun:
                    self._begun = True
                    threading.Thread(target=self._tell, name="warmstart recipes", daemon=True).start()
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(recipe)

    def _tell(self) -> None:
        # Here and not above: every process of a server imports this module, and most have nothing to tell.
        from sglang_warmstart.node.client import ServiceClient, ServiceGoneError

        try:
            client = ServiceClient(Path(os.environ[SERVICE]))
            while True:
                client.compiled(self._waiting.get())
        except (ServiceGoneError, KeyError, ValueError) as error:
            logger.info("warmstart: the next start does not know what is compiled from now on: %s", first_line(error))


class Launch:
    """This launch, as it was when the plugin was loaded: SGLang sets variables of its own later.

    Args:
        words: of the command line.
        environment: of the process.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._words, self._environment = list(words), dict(environment)

    def begin_early(self) -> None:
        """Start the service now, if there is a plan of this command line, or a list for its first start.

        SGLang has more to import, and arguments to parse, before it comes to its ranks. Not in what a server has
        started, which has its variables, and its service; nor where kernels are restored, or only recorded: a service
        has to know that from its start.
        """
        if multiprocessing.parent_process() is not None or {SERVICE, PLANS, BUNDLE.name} & os.environ.keys():
            return
        from sglang_warmstart.node.launch import start_early
        from sglang_warmstart.sglang.exact_warmup.warmup import is_wanted

        if not is_wanted() or importlib.util.find_spec("deep_gemm") is None:
            return  # there will be no service
        if known := known_of(self._words, self._environment):
            start_early(os.environ, server_environment(os.environ), **known)

    def plan(self, server_args: Any) -> Path:
        """Where its plan is: what all its ranks on this node compile is in one.

        By the command line, which ``sglang-warmstart run`` knows too; for an engine that a program starts, by its
        arguments.
        """
        if (plan := plan_for(self._words, self._environment)) is not None:
            return plan.absolute()
        from sglang_warmstart.deepgemm.marker import name_of
        from sglang_warmstart.libraries.build_plan import PLANS
        from sglang_warmstart.sglang.exact_warmup.launch import launch_of

        launch = {**launch_of(server_args, 0, self._environment), "rank": f"all of node {server_args.node_rank}"}
        return deep_gemm_cache(self._environment).absolute() / PLANS / f"launch-{name_of(launch)}.json"

    def begin_builds(self, server_args: Any) -> threading.Thread | None:
        """Have the service build what the plan has, and tell it where caches and events are.

        It has just been started, if there is one, or before this process; it need not listen yet. Returns who tells it.
        """
        if SERVICE not in os.environ:
            return None
        try:
            plan = self.plan(server_args) if BUILD_AHEAD.value(os.environ) else None
        except Exception as error:
            # Whatever the arguments are, the server starts without.
            logger.warning("warmstart: nothing is built ahead: %s", first_line(error))
            return None
        teller = threading.Thread(target=_begin, args=(Path(os.environ[SERVICE]), plan), daemon=True)
        teller.start()
        return teller


def _begin(service: Path, plan: Path | None) -> None:
    from sglang_warmstart.libraries.table import build_variables
    from sglang_warmstart.node.client import ServiceClient

    environment = {name: os.environ[name] for name in _RUN if name in os.environ} | build_variables(os.environ)
    try:
        client = ServiceClient(service, ANSWER_S)
        try:
            client.build_planned(plan, environment)
        finally:
            client.close()
    except Exception as error:
        logger.warning("warmstart: nothing is built ahead: %s", first_line(error))


class _Installed:
    """What is known of the launch in this process, once the plugin has been loaded."""

    launch: Launch | None = None

    def recipes(self, hooks: Hooks, environ: ModuleType) -> None:
        """Declare the switch on ``Envs``, hear of every recipe of this process, and begin early if it is a server's."""
        declare(hooks, environ, BUILD_AHEAD)
        self.launch = Launch(sys.argv, os.environ)
        if not BUILD_AHEAD.value(os.environ):
            return
        if JIT_MONITOR.value(os.environ) != "off":
            hooks.also_undo(recipes.listen(Teller()))
        try:
            self.launch.begin_early()
        except Exception as error:
            # Whatever it is, the service is started later.
            logger.warning("warmstart: no service before the arguments are parsed: %s", first_line(error))

    def builds(self, hooks: Hooks, engine: ModuleType) -> None:
        """Begin to build before the schedulers are started, when the service has been."""

        def begin(server_args: Any) -> None:
            if self.launch is not None:
                self.launch.begin_builds(server_args)

        before_the_ranks(hooks, engine, begin)


_installed = _Installed()

BUILDING_AHEAD = Feature(
    name="build-ahead",
    gains="what other JIT compilers than DeepGEMM's compiled at an earlier start is built while weights load",
    hooks={
        f"{ENVIRON}.Envs.{BUILD_AHEAD.name}": "the switch, beside its neighbours",
        LAUNCH: "runs once per node before any rank; wrapped before exact-warmup, whose service it asks",
        f"os.environ.{TRITON_CACHE}": "before 0.5.18, where nobody sets it: torch's Inductor would move Triton's cache "
        "away from where its kernels are built, in the middle of a start",
    },
    upstream="none",
    drop_when="upstream builds all its kernels ahead of use",
    built_in_as=(),
    steps=(
        Step((ENVIRON,), _installed.recipes),
        Step((ENVIRON,), install_one_place),
        Step((ENGINE,), _installed.builds, required=False),
    ),
)
