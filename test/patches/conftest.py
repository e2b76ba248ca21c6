"""One tree and one series that most of these tests start from, and SGLang with the committed series."""

from pathlib import Path

import pytest
from making import BEFORE, in_repository, make_series, write
from series import Fork, make_fork


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series of three patches, see `making.STEPS`, with a notice."""
    return write(make_series(tmp_path_factory.mktemp("patches")), {"NOTICE": b"a notice\n"})


@pytest.fixture(scope="session")
def upstream_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same patches with the paths of SGLang's own repository, and with a test."""
    return make_series(tmp_path_factory.mktemp("upstream"), place=in_repository)


@pytest.fixture
def holder(tmp_path: Path) -> Path:
    """The tree that the series is for, as an unpacked wheel."""
    return write(tmp_path / "holder", BEFORE)


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Fork:
    """The installed SGLang with its series. Each test checks out what it looks at."""
    return make_fork(tmp_path_factory.mktemp("fork"))
