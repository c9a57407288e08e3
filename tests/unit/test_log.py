"""Logging: one line a record, harmless text, and nothing that a bad stream could hold up."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from appliance.runtime import log


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_line_with_its_stage_and_fields() -> None:
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=True)
    log.bind("enroll").info("granted %s", "a\nb", extra={"number": 7, "name": "web", "message": "other", "who": object})
    close()
    (line,) = lines(stream)
    assert line["time"].endswith("Z")
    assert (line["level"], line["stage"], line["message"]) == ("info", "enroll", "granted a\nb")
    assert (line["number"], line["name"], line["message_"]) == (7, "web", "other")
    assert line["who"] == "<class 'object'>"


def test_a_traceback_comes_with_it() -> None:
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=True)
    try:
        int("deep")
    except ValueError:
        log.bind("tunnel").exception("it failed")
    close()
    (line,) = lines(stream)
    assert line["traceback"].endswith("base 10: 'deep'")


def test_text_is_for_people_and_cannot_drive_the_terminal() -> None:
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=False)
    log.bind("enroll").warning("from %s", "\x1b[2Jevil\n\u202e", extra={"se": "x"})
    try:
        int("deep")
    except ValueError:
        logging.getLogger("foreign.library").exception("foreign")
    close()
    first, second, *trace = stream.getvalue().splitlines()
    assert first.endswith("warning enroll: from \\x1b[2Jevil\\n\\u202e se=x")
    assert second.endswith("error   foreign.library: foreign")
    assert trace[-1].endswith("base 10: 'deep'")


def test_plain_loggers_get_a_stage_and_keep_their_fields() -> None:
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=True)
    logging.getLogger("appliance.controller.enroll").info("x", extra={"number": 3})
    close()
    (line,) = lines(stream)
    assert (line["stage"], line["number"]) == ("enroll", 3)


def test_levels_are_ours_and_libraries_are_heard_from_warnings_on() -> None:
    stream = io.StringIO()
    close = log.setup(level="debug", stream=stream, json=True)
    log.bind("enroll").debug("ours")
    logging.getLogger("asyncssh").info("not heard")
    logging.getLogger("asyncssh").warning("heard")
    close()
    assert [line["message"] for line in lines(stream)] == ["ours", "heard"]
    log.bind("enroll").error("after the end")
    assert len(lines(stream)) == 2


def test_levels_come_back() -> None:
    before = logging.getLogger().level, logging.getLogger("appliance").level, list(logging.getLogger().handlers)
    log.setup(level="error", stream=io.StringIO(), json=True)()
    assert (logging.getLogger().level, logging.getLogger("appliance").level, logging.getLogger().handlers) == before


def test_a_record_with_wrong_arguments_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would raise
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=True)
    log.bind("enroll").info("%d", "text")
    close()
    (line,) = lines(stream)
    assert line["message"] == "%d ('text',)"


class Full(io.StringIO):
    """A disk without room, for a while."""

    is_full = True

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_disturbs_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Full()
    close = log.setup(level="info", stream=stream, json=True)
    log.bind("enroll").info("lost")
    close()
    assert capsys.readouterr().err == ""


class Blocked(io.StringIO):
    """A terminal on hold."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.release = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.release.wait()
        return super().write(text)


def test_a_blocked_stream_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "QUEUE_RECORDS", 3)
    stream = Blocked()
    close = log.setup(level="info", stream=stream, json=True)
    logger = log.bind("enroll")
    logger.info("0")
    assert stream.reached.wait(10.0)
    for number in range(1, 10):
        logger.info(str(number))
    stream.release.set()
    deadline = threading.Event()
    while len(stream.getvalue().splitlines()) < 4 and not deadline.wait(0.005):
        pass
    logger.info("after")
    close()
    said = [line["message"] for line in lines(stream)]
    assert said == ["0", "1", "2", "3", "6 log record(s) dropped: the log wasn't written fast enough", "after"]


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "QUEUE_RECORDS", 1)
    monkeypatch.setattr(log, "CLOSE_TIMEOUT_S", 0.05)
    stream = Blocked()
    close = log.setup(level="info", stream=stream, json=True)
    logger = log.bind("enroll")
    logger.info("0")
    assert stream.reached.wait(10.0)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "log-write"]
    logger.info("1")
    close()
    assert thread.is_alive(), "left behind, as a daemon thread"
    assert thread.daemon
    stream.release.set()
    thread.join(10.0)
    assert [line["message"] for line in lines(stream)] == ["0", "1"]


def test_draining_waits_until_all_before_it_is_written() -> None:
    """What a daemon that executes itself anew would else lose with its writer thread."""
    stream = io.StringIO()
    close = log.setup(level="info", stream=stream, json=True)
    logger = log.bind("enroll")
    for number in range(50):
        logger.info(str(number))
        if number % 10 == 9:
            log.drain()
            assert len(lines(stream)) == number + 1
    close()
    log.drain()  # nothing is there to wait for


def test_draining_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CLOSE_TIMEOUT_S", 0.05)
    stream = Blocked()
    close = log.setup(level="info", stream=stream, json=True)
    log.bind("enroll").info("0")
    log.drain()
    stream.release.set()
    close()


class Counted(io.StringIO):
    """Counts writes."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


def test_a_record_is_written_at_once_and_a_flood_in_few_writes() -> None:
    stream = Counted()
    close = log.setup(level="info", stream=stream, json=True)
    logger = log.bind("enroll")
    logger.info("first")
    log.drain()
    assert stream.writes <= 2
    for number in range(1000):
        logger.info(str(number))
    close()
    assert len(lines(stream)) == 1001
    assert stream.writes < 100
