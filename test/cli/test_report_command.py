"""``sglang-warmstart report``: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.sample_runs import HOSTILE, write_exact, write_hostile, write_process, write_stock
from sglang_warmstart.base.events import Event
from sglang_warmstart.cli import app
from typer.testing import CliRunner, Result


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    return write_exact(tmp_path / "exact", serving=True)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return write_stock(tmp_path / "stock")


def report(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def here() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_without_options_a_page_is_written_here(exact: Path) -> None:
    result = report(exact)
    assert result.stderr == "page: startup.html\n"
    assert here() == ["startup.html"]
    assert Path("startup.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("options", "written"),
    [
        (["--text"], []),
        (["--json"], []),
        (["--trace", "trace.json"], ["trace.json"]),
        (["--text", "-o", "page.html"], ["page.html"]),
        (["--trace", "trace.json", "--output", "page.html"], ["page.html", "trace.json"]),
    ],
    ids=" ".join,
)
def test_a_page_is_written_where_nothing_else_is_wanted_or_one_is_named(
    exact: Path, options: list[str], written: list[str]
) -> None:
    report(exact, *options)
    assert here() == written


def test_the_newest_run_of_the_cache_is_taken_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "cache" / "warmstart" / "events"
    write_stock(runs / "20261124-100000-7")
    write_exact(runs / "20261125-100000-7")
    monkeypatch.setenv("SGLANG_DG_CACHE_DIR", str(tmp_path / "cache"))
    assert json.loads(report("--json").stdout)["run"] == "20261125-100000-7"


def test_the_numbers_of_one_run_and_of_two(exact: Path, stock: Path) -> None:
    one = json.loads(report(exact, "--json").stdout)
    assert (one["run"], one["ahead"], len(one["serving"])) == ("exact", 39, 1)
    assert sum(each["seconds"] for each in one["categories"]) == pytest.approx(one["seconds"])
    two = json.loads(report(stock, "--compare", exact, "--json").stdout)
    assert [each["run"] for each in two["runs"]] == ["stock", "exact"]
    assert two["runs"][1] == one
    three = json.loads(report(stock, "--compare", exact, "--compare", stock, "--json").stdout)
    assert [each["run"] for each in three["runs"]] == ["stock", "exact", "stock"]
    assert two["compared"] == "B is ready 94.7 s earlier than A: after 79.4 s instead of 174.1 s."


def test_the_text_has_the_numbers_of_the_page(exact: Path) -> None:
    lines = report(exact, "--text").stdout.splitlines()
    assert lines[1] == "Ready after 79.4 s; 39 kernels compiled by 4 workers, 2 on call, 1 while serving."
    assert lines[2].startswith("JIT while serving: triton _fwd_grouped_kernel_stage1 for x: *bf16")
    assert lines[3].startswith("  instead: a forward of this shape before the server is ready would have")
    assert "  Compile kernels ahead: 38.4 s, 48.4 %" in lines
    numbers = json.loads(report(exact, "--json").stdout)
    (first, *_) = numbers["compiles"]
    assert any(line.startswith(f"  deep-gemm {first['name']} for {first['target']}: 5.14 s") for line in lines)


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(exact: Path) -> None:
    (exact / "rank-4101.jsonl").write_text("no header\n")
    result = report(exact, "-o", "page.html", "--text")
    (line, page) = result.stderr.splitlines()
    assert line.startswith("exact: rank-4101.jsonl: ")
    assert line.endswith(": the report goes without that")
    assert page == "page: page.html"
    assert "PP0 TP0" in Path("page.html").read_text(encoding="utf-8")
    assert "rank-4101.jsonl" in Path("page.html").read_text(encoding="utf-8")
    assert result.stdout.splitlines()[1].startswith("Ready after")


@pytest.mark.parametrize("option", [[], ["--text"], ["--compare"]], ids=["alone", "text", "second"])
def test_no_events_are_refused_in_one_line(exact: Path, tmp_path: Path, option: list[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = report(*([exact, *option, empty] if option == ["--compare"] else [empty, *option]), status=2)
    assert result.stderr == f"no events in {empty}: start a server with the plugin, or name another directory\n"
    assert result.stdout == ""
    assert here() == []


@pytest.mark.parametrize("option", ["--output", "--trace"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(exact: Path, option: str) -> None:
    what = "page" if option == "--output" else "trace"
    Path("file").touch()
    result = report(exact, option, "file/x", status=2)
    assert result.stderr.startswith("file/x cannot be written (")
    assert result.stderr.endswith(f"): name another place for the {what}\n")
    assert report(exact, option, ".", status=2).stderr == f". is a directory: name a file for the {what}\n"
    assert here() == ["file"]


def test_what_was_there_stays_whole_when_a_page_cannot_be_written(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("page.html").write_text("the old one")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    result = report(exact, "-o", "page.html", status=2)
    assert result.stderr == "page.html cannot be written (No space left on device): name another place for the page\n"
    assert here() == ["page.html"]
    assert Path("page.html").read_text() == "the old one"


def test_a_terminal_is_not_told_what_to_do_by_a_name(tmp_path: Path) -> None:
    result = report(write_hostile(tmp_path / "hostile"), "--text")
    assert "\x1b" in HOSTILE
    assert "\x1b" not in result.stdout + result.stderr
    assert "owned" in result.stdout


def test_a_kernel_whose_name_is_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    name = "kernel<[bold]x[/bold]>"
    event = Event(kind="jit", name=name, at=1.0, seconds=1.0, library="triton")
    write_process(tmp_path / "run", "rank", 1, 0.0, [event], tp_rank="0")
    assert f"triton {name}: 1.00 s, on call, TP0" in report(tmp_path / "run", "--text").stdout
