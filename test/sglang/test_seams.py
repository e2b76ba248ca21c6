"""Which seam a release gets, and that its places are there."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from kit.release import installed_release, sglang_directory
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang.seams import SEAMS, seam, seam_of
from sglang_warmstart.sglang.seams.v0_5_12 import Seam0512
from sglang_warmstart.sglang.seams.v0_5_13 import Seam0513
from sglang_warmstart.sglang.seams.v0_5_14 import BASE_RUNNER, Seam0514
from sglang_warmstart.sglang.seams.v0_5_19 import Seam0519

FAMILIES = (("0.5.19", Seam0519), ("0.5.14", Seam0514), ("0.5.13", Seam0513), ("0.5.12", Seam0512))


def test_the_installed_release_has_the_seam_of_its_family() -> None:
    expected = next(kind for since, kind in FAMILIES if installed_release().since(since))
    assert type(seam()) is expected


def test_every_place_of_the_seam_is_in_the_installed_release() -> None:
    missing = []
    for module, owner, method in [*seam().forwards, *seam().steps]:
        cls = getattr(importlib.import_module(module), owner)
        if method not in vars(cls):
            missing.append(f"{module}.{owner}.{method}")
    assert missing == []


def test_the_dummy_forward_takes_what_the_seam_says() -> None:
    module = importlib.import_module(seam().warm_up_module)
    dummy_run = inspect.unwrap(vars(seam().dummy_runner(module))["_dummy_run"])
    assert ", ".join(inspect.signature(dummy_run).parameters).startswith(
        seam().dummy_run_parameters.removesuffix(", forward_mode_override")
    )


def newer(root: Path, base_runner: str) -> Path:
    """The source of a release that nobody has seen yet, as far as a seam looks at it."""
    for path, text in {
        "srt/model_executor/runner/base_runner.py": base_runner,
        "srt/server_args.py": "class ServerArgs:\n    def resolved_dict(self): ...\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_newer_release_gets_the_newest_seam_where_everything_fits(tmp_path: Path) -> None:
    assert seam_of(newer(tmp_path, "class BaseRunner: ...\n")) is SEAMS[0]


def test_where_something_has_moved_it_gets_an_older_one_and_the_place_is_named(tmp_path: Path) -> None:
    old = seam_of(newer(tmp_path, "class AnotherRunner: ...\n"))
    assert type(old) is Seam0512
    module = type(importlib)("sglang.srt.model_executor.model_runner")
    with pytest.raises(StandsAsideError, match="ModelRunner"):
        old.hook_warm_up(Hooks("test"), module, lambda *_: None)


def test_a_base_runner_that_asks_nothing_before_it_autotunes_is_named() -> None:
    module = type(importlib)(BASE_RUNNER)
    module.BaseRunner = type("BaseRunner", (), {"__module__": BASE_RUNNER, "warmup": lambda self: None})
    with pytest.raises(StandsAsideError, match="should_run_flashinfer_autotune"):
        SEAMS[0].hook_warm_up(Hooks("test"), module, lambda *_: None)


def test_a_source_that_cannot_be_found_has_the_oldest_seam(tmp_path: Path) -> None:
    assert type(seam_of(tmp_path)) is Seam0512
    assert seam_of(Path(sglang_directory())) is seam()
