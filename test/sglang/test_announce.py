"""What the plugin says reaches the log once, also what was said before there was a log."""

import logging
from collections.abc import Iterator

import pytest
from sglang_warmstart.sglang import announce
from sglang_warmstart.sglang.announce import LOGGER_NAME, Announcer


class Log(logging.Handler):
    """Keeps what reaches the plugin's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """A process in which nobody has set up logging."""
    # The root logger itself will not do: pytest gives it a handler of its own for each test.
    monkeypatch.setattr(announce, "logging_is_set_up", lambda: False)
    logger, log = logging.getLogger(LOGGER_NAME), Log()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    yield log
    logger.removeHandler(log)
    logger.setLevel(level)


def lines(log: Log) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in log.records]


def test_nothing_is_written_before_logging_is_configured(log: Log) -> None:
    announcer = Announcer()
    announcer.say("early")
    announcer.warn("early warning")
    assert lines(log) == []


def test_what_was_kept_is_written_in_order_and_at_its_level(log: Log) -> None:
    announcer = Announcer()
    announcer.say("first")
    announcer.warn("second")
    announcer.say("third")
    announcer.open()
    assert lines(log) == [("INFO", "first"), ("WARNING", "second"), ("INFO", "third")]


def test_lines_are_written_at_once_when_logging_is_configured(log: Log) -> None:
    announcer = Announcer()
    announcer.open()
    announcer.say("now")
    assert lines(log) == [("INFO", "now")]
    announcer.warn("and now")
    assert lines(log)[1:] == [("WARNING", "and now")]


def test_configuring_logging_again_repeats_nothing(log: Log) -> None:
    announcer = Announcer()
    announcer.say("early")
    announcer.open()
    announcer.open()
    assert lines(log) == [("INFO", "early")]


def test_a_line_is_said_once_whenever_it_is_said(log: Log) -> None:
    announcer = Announcer()
    announcer.say("twice")
    announcer.say("twice")
    announcer.open()
    announcer.say("twice")
    assert lines(log) == [("INFO", "twice")]


def test_a_percent_sign_is_text(log: Log) -> None:
    announcer = Announcer()
    announcer.open()
    announcer.say("100%d %s")
    assert lines(log) == [("INFO", "100%d %s")]


def test_the_logger_is_below_sglang_so_that_its_configuration_covers_ours() -> None:
    assert LOGGER_NAME.split(".")[0] == "sglang"
    assert Announcer().logger is logging.getLogger(LOGGER_NAME)


def test_announcers_do_not_share_what_they_have_said(log: Log) -> None:
    for _ in range(2):
        announcer = Announcer()
        announcer.open()
        announcer.say("a line")
    assert lines(log) == [("INFO", "a line")] * 2


def test_a_warning_is_not_kept_where_somebody_has_set_up_logging_for_warnings(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announce, "logging_is_set_up", lambda: True)
    logging.getLogger(LOGGER_NAME).setLevel(logging.WARNING)
    announcer = Announcer()
    announcer.say("for later")
    announcer.warn("a feature stands aside")
    assert lines(log) == [("WARNING", "a feature stands aside")]


def test_logging_is_set_up_when_the_root_logger_has_a_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert not announce.logging_is_set_up()
    logging.basicConfig()
    assert announce.logging_is_set_up()
