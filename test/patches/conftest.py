"""One tree and one series that most of these tests start from."""

from pathlib import Path

import pytest
from making import BEFORE, make_series, write


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series of three patches, see `making.STEPS`, with a notice."""
    return write(make_series(tmp_path_factory.mktemp("patches")), {"NOTICE": b"a notice\n"})


@pytest.fixture
def holder(tmp_path: Path) -> Path:
    """The tree that the series is for, as an unpacked wheel."""
    return write(tmp_path / "holder", BEFORE)
