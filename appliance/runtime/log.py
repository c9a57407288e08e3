"""Logging that can't stop a daemon: records go through a bounded queue to one writer thread.

A full disk, a closed pipe or a terminal on hold makes records be dropped and counted, never a service wait or raise;
the count is told with the next record that gets through. Records are one line each, JSON or text; control characters
are escaped in both, since names and reasons in them may come from a hostile peer.
"""

from __future__ import annotations

import datetime as dt
import json as _json
import logging
import logging.handlers
import queue
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

QUEUE_RECORDS = 4096
CLOSE_TIMEOUT_S = 2.0
_ROOT = "appliance"


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
    output = _Output(stream)
    output.setFormatter(_JsonFormatter() if json else _TextFormatter())
    records: queue.Queue[Any] = queue.Queue(QUEUE_RECORDS)
    entry = _Entry(records)
    listener = _Listener(records, output)
    own, root = logging.getLogger(_ROOT), logging.getLogger()
    former = own.level, root.level
    own.setLevel(level.upper())
    root.setLevel(max(logging.WARNING, own.level))
    root.addHandler(entry)
    listener.start()

    def close() -> None:
        root.removeHandler(entry)
        listener.stop()
        own.setLevel(former[0])
        root.setLevel(former[1])

    return close


class _Entry(logging.handlers.QueueHandler):
    """Puts records into the queue, or counts them."""

    def __init__(self, records: queue.Queue[Any]) -> None:
        super().__init__(records)
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
        try:
            if self._dropped:
                text = f"{self._dropped} log record(s) dropped: the log wasn't written fast enough"
                self.queue.put_nowait(
                    logging.makeLogRecord({"name": _ROOT, "levelname": "WARNING", "msg": text, "stage": "log"})
                )
                self._dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1


class _Listener(logging.handlers.QueueListener):
    """The writer thread, with an end that a full queue or a blocked stream can't hold up."""

    def __init__(self, records: queue.Queue[Any], output: logging.Handler) -> None:
        super().__init__(records, output)
        self._records = records

    def enqueue_sentinel(self) -> None:
        """Asks the thread to end after what is queued."""
        try:
            self._records.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return  # the stream blocks; the thread is a daemon and dies with the process

    def stop(self) -> None:
        """Waits until what is queued is written, at most two seconds."""
        self.enqueue_sentinel()
        thread = self._thread
        self._thread = None
        if thread is not None:
            thread.join(CLOSE_TIMEOUT_S)


class _Output(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Stays silent: where the log can't be written there is no place to say so."""


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


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
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


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = dt.datetime.fromtimestamp(record.created).astimezone()
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        text = f"{_stage(record)}: {record.getMessage()}{fields}"
        trace = f"\n{record.exc_text}" if record.exc_text else ""
        return f"{at:%H:%M:%S} {record.levelname.lower():7} {_printable(text)}{trace}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
