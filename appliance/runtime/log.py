"""Logging that can't stop a daemon: records go through a bounded queue to one writer thread.

A full disk, a closed pipe or a terminal on hold makes records be dropped and counted, never a service wait or raise;
the count is told with the next record that gets through. Records are one line each, JSON or text; control characters
are escaped in both, since names and reasons in them may come from a hostile peer.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json as _json
import logging
import logging.handlers
import queue
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

QUEUE_RECORDS = 4096
CLOSE_TIMEOUT_S = 2.0
GATHER_S = 0.02
"""Least time between two writes: what a process that is killed while it logs much may owe to its log."""
_ROOT = "appliance"

Form = Callable[[logging.LogRecord], str]
_Queued = logging.LogRecord | threading.Event | None
"""A record; an event that is set once all before it is written; None ends."""


class _StageAdapter(logging.LoggerAdapter[logging.Logger]):
    """Adds the stage, and takes any field name in `extra`, also those that `LogRecord` has itself."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {"stage": (self.extra or {})["stage"], "fields": dict(kwargs.get("extra") or {})}
        return msg, kwargs


def bind(stage: str) -> logging.LoggerAdapter[logging.Logger]:
    """Returns the logger of a stage; its records carry `stage` and the fields given by `extra=`."""
    return _StageAdapter(logging.getLogger(f"{_ROOT}.{stage}"), {"stage": stage})


def setup(*, level: str, stream: TextIO, json: bool) -> Callable[[], None]:
    """Sends all log records to `stream`. Returns what flushes and ends it (within two seconds, whatever hangs).

    Args:
        level: of our own records: `debug`, `info`, `warning`, `error`. Libraries are heard from `warning` on.
        stream: text stream; it may fail or block.
        json: JSON lines, or text for people.
    """
    records: queue.SimpleQueue[_Queued] = queue.SimpleQueue()
    entry = _Entry(records)
    own, root = logging.getLogger(_ROOT), logging.getLogger()
    former = own.level, root.level
    own.setLevel(level.upper())
    root.setLevel(max(logging.WARNING, own.level))
    root.addHandler(entry)
    writer = _Writer(records, stream, _json_line if json else _text_line)

    def close() -> None:
        root.removeHandler(entry)
        writer.stop()
        own.setLevel(former[0])
        root.setLevel(former[1])

    return close


class _Entry(logging.handlers.QueueHandler):
    """Puts records into the queue, or counts them."""

    def __init__(self, records: queue.SimpleQueue[_Queued]) -> None:
        super().__init__(records)
        self._records = records
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Renders message and traceback here, where the objects they speak of still are what they were."""
        try:
            record.message = record.getMessage()
        except (TypeError, ValueError):  # a defect of ours; what we know is still worth a line
            record.message = f"{record.msg} {record.args!r}"
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.args = record.exc_info = None
        record.msg = record.message
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        # Called under the handler's lock, so the count is exact.
        if self._records.qsize() >= QUEUE_RECORDS:
            self._dropped += 1
            return
        if self._dropped:
            text = f"{self._dropped} log record(s) dropped: the log wasn't written fast enough"
            self._records.put(
                logging.makeLogRecord({"name": _ROOT, "levelname": "WARNING", "msg": text, "stage": "log"})
            )
            self._dropped = 0
        self._records.put(record)

    def drain(self) -> None:
        """See the function of that name."""
        written = threading.Event()
        self._records.put(written)
        written.wait(CLOSE_TIMEOUT_S)


def drain() -> None:
    """Waits until what was logged so far is written, two seconds at most: the writer doesn't survive an exec."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Entry):
            handler.drain()


class _Writer:
    """The thread that writes: a record at once, and what comes within `GATHER_S` after it as one write.

    A write for each record would cost a daemon under load a switch between threads for each, more than the record.
    """

    def __init__(self, records: queue.SimpleQueue[_Queued], stream: TextIO, form: Form) -> None:
        self._records = records
        self._stream = stream
        self._form = form
        self._ends = threading.Event()
        # A daemon: a stream that blocks for ever must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="log-write", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        taken: list[_Queued] = []
        while None not in taken:
            taken = [self._records.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    taken.append(self._records.get_nowait())
            lines = [f"{self._form(entry)}\n" for entry in taken if isinstance(entry, logging.LogRecord)]
            with contextlib.suppress(OSError, ValueError):  # there is no place to say that the log can't be written
                self._stream.write("".join(lines))
                self._stream.flush()
            for entry in taken:
                if isinstance(entry, threading.Event):
                    entry.set()
            self._ends.wait(GATHER_S)

    def stop(self) -> None:
        """Waits until what is queued is written, at most two seconds."""
        self._ends.set()
        self._records.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)


_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "stage", "fields"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`, by `bind` or to a plain logger."""
    return {
        **{name: value for name, value in vars(record).items() if name not in _OWN},
        **getattr(record, "fields", {}),
    }


def _stage(record: logging.LogRecord) -> str:
    """The bound stage; for a plain logger of ours its module, which has the stage's name."""
    name = record.name.rpartition(".")[2] if record.name.startswith(_ROOT) else record.name
    return str(getattr(record, "stage", name))


def _json_line(record: logging.LogRecord) -> str:
    at = dt.datetime.fromtimestamp(record.created, dt.UTC)
    line = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "stage": _stage(record),
        "message": record.getMessage(),
        **({"traceback": record.exc_text} if record.exc_text else {}),
    }
    for name, value in _fields(record).items():
        line[name if name not in line else f"{name}_"] = value
    return _json.dumps(line, default=str)


def _text_line(record: logging.LogRecord) -> str:
    at = dt.datetime.fromtimestamp(record.created).astimezone()
    fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
    text = f"{_stage(record)}: {record.getMessage()}{fields}"
    trace = f"\n{record.exc_text}" if record.exc_text else ""
    return f"{at:%H:%M:%S} {record.levelname.lower():7} {_printable(text)}{trace}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
