"""What the plugin says reaches the log once, also what was said before there was a log."""

import logging

import pytest
from sglang_warmstart.announce import LOGGER_NAME, Announcer


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    return caplog


def lines(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in log.records if record.name == LOGGER_NAME]


def test_nothing_is_written_before_logging_is_configured(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.say("early")
    announcer.warn("early warning")
    assert lines(log) == []


def test_what_was_kept_is_written_in_order_and_at_its_level(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.say("first")
    announcer.warn("second")
    announcer.say("third")
    announcer.open()
    assert lines(log) == [("INFO", "first"), ("WARNING", "second"), ("INFO", "third")]


def test_lines_are_written_at_once_when_logging_is_configured(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.open()
    announcer.say("now")
    assert lines(log) == [("INFO", "now")]
    announcer.warn("and now")
    assert lines(log)[1:] == [("WARNING", "and now")]


def test_configuring_logging_again_repeats_nothing(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.say("early")
    announcer.open()
    announcer.open()
    assert lines(log) == [("INFO", "early")]


def test_a_line_is_said_once_whenever_it_is_said(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.say("twice")
    announcer.say("twice")
    announcer.open()
    announcer.say("twice")
    assert lines(log) == [("INFO", "twice")]


def test_a_percent_sign_is_text(log: pytest.LogCaptureFixture) -> None:
    announcer = Announcer()
    announcer.open()
    announcer.say("100%d %s")
    assert lines(log) == [("INFO", "100%d %s")]


def test_the_logger_is_below_sglang_so_that_its_configuration_covers_ours() -> None:
    assert LOGGER_NAME.split(".")[0] == "sglang"
    assert Announcer().logger is logging.getLogger(LOGGER_NAME)


def test_announcers_do_not_share_what_they_have_said(log: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        announcer = Announcer()
        announcer.open()
        announcer.say("a line")
    assert lines(log) == [("INFO", "a line")] * 2
