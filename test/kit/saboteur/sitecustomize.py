"""On the path of a server: makes hooks of the plugin raise, all of them or the one that SABOTAGE names.

Each hook that SGLang reached is a line of the file SABOTAGED.
"""

import os
from types import ModuleType
from typing import Any

import wrapt


def _sabotage(guard: ModuleType) -> None:
    real, wanted = guard.guarded, os.environ["SABOTAGE"]

    def guarded(where: str, around: Any, *rest: Any, **named: Any) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            with open(os.environ["SABOTAGED"], "a") as file:  # noqa: PTH123
                file.write(f"{where}\n")
            raise RuntimeError("sabotaged")

        return real(where, fail if wanted in ("all", where) else around, *rest, **named)

    guard.guarded = guarded


if "SABOTAGE" in os.environ:
    wrapt.register_post_import_hook(_sabotage, "sglang_warmstart.base.guard")
