"""Where bundles come from: files and stores; what cannot be had is one line that says why."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.confined import run_python
from sglang_warmstart.bundle import source
from sglang_warmstart.bundle.manifest import BundleError

CONTENT = bytes(range(256)) * 10_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a bundle.tar.zst"
    path.write_bytes(CONTENT)
    return path


def read(place: str, **options: int) -> bytes:
    with source.opened(place, **options) as stream:
        first = stream.read()
        stream.seek(0)
        assert stream.read() == first
        return first


def test_a_long_word_is_looked_through_once() -> None:
    start = time.monotonic()
    assert source.shown("x" * 300_000) == "x" * 300_000
    assert source.shown("x" * 300_000 + "://user:password@host/a?b") == "x" * 300_000 + "://host/a"
    assert time.monotonic() - start < 5


def test_a_path_is_opened_where_it_is(file: Path) -> None:
    assert read(str(file)) == CONTENT
    assert read(f"file://{file}") == CONTENT


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(file: Path) -> Iterator[str]:
    """A real web server for the directory of the file."""

    def handler(*args: object) -> _Handler:
        return _Handler(*args, directory=str(file.parent))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_one_of_a_web_server_is_fetched(web: str) -> None:
    pytest.importorskip("aiohttp")
    assert read(f"{web}/a%20bundle.tar.zst") == CONTENT


def test_one_that_a_web_server_does_not_have_is_one_line(web: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(BundleError) as caught:
        read(f"{web}/another.tar.zst")
    assert str(caught.value).startswith(f"{web}/another.tar.zst: cannot be fetched: ClientResponseError: 404, ")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("aiohttp")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/bundle.tar.zst"
        with pytest.raises(BundleError, match="cannot be fetched: ClientConnectorError: ") as caught:
            read(url)
    assert "\n" not in str(caught.value)


def test_no_more_than_the_limit_is_fetched(web: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(BundleError, match="larger than 1000 bytes"):
        read(f"{web}/a%20bundle.tar.zst", limit_bytes=1000)


def test_a_store_of_any_kind_that_fsspec_knows_will_do() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bundles/one", CONTENT)
    assert read("memory://bundles/one") == CONTENT


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/is/not/there", "No such file or directory"),
        ("/", "Is a directory"),
        ("file:///is/not/there", "No such file or directory"),
        ("nonsense://host/path", "cannot be fetched: ValueError"),
        ("", "No such file or directory|Is a directory"),
    ],
)
def test_what_cannot_be_opened_is_one_line(place: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        read(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "package", "extra"),
    [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"), ("hf", "huggingface_hub", "hf"), ("https", "aiohttp", "http")],
)
def test_a_store_whose_package_is_missing_names_the_extra(scheme: str, package: str, extra: str) -> None:
    code = """
import sys
sys.modules[sys.argv[1]] = None
from sglang_warmstart.bundle import source
from sglang_warmstart.bundle.manifest import BundleError
try:
    with source.opened(sys.argv[2]):
        pass
except BundleError as error:
    print(error)
"""
    said = run_python(code, package, f"{scheme}://bucket/bundle.tar.zst")
    assert said.count("\n") == 1
    assert said.rstrip().endswith(f"pip install 'sglang-warmstart[{extra}]'")


def test_a_proxy_that_the_environment_names_is_used(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    # The web server as a proxy: it does not have the file, and says so in place of a host that is not there.
    monkeypatch.setenv("http_proxy", web)
    with pytest.raises(BundleError, match="cannot be fetched: ClientResponseError: 404"):
        read("http://is.not.there.invalid/another.tar.zst")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/a/path?b", "/a/path?b"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://user:pw@host:8080/a/b.zst?X-Signature=1#c", "https://host:8080/a/b.zst"),
        ("http://[broken?secret", "http://[broken"),
        ("simplecache::https://u:p@ss@host/a?token", "simplecache::https://host/a"),
    ],
)
def test_what_is_shown_of_a_place_has_no_secrets(place: str, expected: str) -> None:
    assert source.shown(place) == expected


def test_nothing_stays_behind(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    read(f"{web}/a%20bundle.tar.zst")
    with pytest.raises(BundleError):
        read(f"{web}/another.tar.zst")
    assert list((tmp_path / "t").iterdir()) == []
    assert "fsspec" in sys.modules
