"""What the tests of the libraries share."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.restored_cache import write


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FlashInfer 0.6.11 of which there is nothing but its place and two headers."""
    site = tmp_path / "site"
    write(site, ["flashinfer/__init__.py", "flashinfer/data/include/a.h", "flashinfer/data/csrc/b.cu"])
    (site / "flashinfer_python-0.6.11.dist-info").mkdir()
    (site / "flashinfer_python-0.6.11.dist-info" / "METADATA").write_text("Name: flashinfer-python\nVersion: 0.6.11\n")
    (site / "flashinfer" / "__init__.py").write_text("raise AssertionError('it is imported')")
    monkeypatch.syspath_prepend(site)
    return site / "flashinfer"
