"""Events for programs elsewhere: each one is handed to a hook program and posted to a webhook.

An outlet has a queue of its own with an end, and a thread that works it off in order. Nobody waits for it: an event
that finds the queue full is dropped and counted, and the next that gets through says how many were. A hook program
gets the event as JSON on stdin and has `HOOK_DEADLINE_S`; one that fails is told in the log and not run again for that
event. A webhook is tried again with back-off while its answer isn't a 2xx, `TRIES` times in all.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from appliance import __version__
from appliance.errors import ApplianceError, UnreachableError
from appliance.protocol.operator import Event
from appliance.runtime import child
from appliance.runtime.backoff import Backoff
from appliance.runtime.stop import StopToken

_log = logging.getLogger(__name__)

QUEUE_SIZE = 1000
HOOK_DEADLINE_S = 10.0
WEBHOOK_DEADLINE_S = 10.0
TRIES = 6
JOIN_S = 1.0
_MAX_ANSWER_BYTES = 64 * 1024
_CLEAN = ("env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What an outlet sends."""

    cluster_id: str
    node: int
    event: Event
    dropped: int
    """Events lost since the one before, because this outlet was too slow."""


class Outlet:
    """One way out. `offer` is for the loop; a thread does the rest.

    Args:
        name: for messages.
        send: delivers one notice; raises `ApplianceError`.
        tries: how often one is tried before it is given up.
        cluster_id: of this controller.
        node: its number.
        queue_size: how many may wait.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[bytes], None],
        *,
        tries: int,
        cluster_id: str,
        node: int,
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        self.name = name
        self._send = send
        self._tries = tries
        self._cluster_id = cluster_id
        self._node = node
        self._queue: queue.Queue[Event | None] = queue.Queue(queue_size)
        self._stop = StopToken()
        self._lock = threading.Lock()
        self._unsaid = 0
        self.sent = 0
        self.dropped = 0
        """Events that never got out, since the start."""
        self.error = ""
        """Why the newest one did not get out, "" where it did."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def offer(self, event: Event) -> None:
        """Takes an event; never waits."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            self.dropped += 1
            self._unsaid += 1

    def close(self) -> None:
        """Ends; what waits is not sent any more."""
        self._stop.stop("the controller stops")
        with contextlib.suppress(queue.Full):  # then the thread looks at the stop token after the event it is at
            self._queue.put_nowait(None)
        self._thread.join(JOIN_S)

    @property
    def problem(self) -> str:
        """What an operator should know of it, "" where nothing."""
        if not self.error:
            return ""
        return f"{self.name} does not get events out ({self.dropped} dropped since the start): {self.error}"

    def _run(self) -> None:
        while not self._stop.stopped:
            event = self._queue.get()
            if event is None or self._stop.stopped:
                return
            with self._lock:
                dropped, self._unsaid = self._unsaid, 0
            notice = Notice(cluster_id=self._cluster_id, node=self._node, event=event, dropped=dropped)
            self._deliver(msgspec.json.encode(notice) + b"\n", event)

    def _deliver(self, body: bytes, event: Event) -> None:
        backoff = Backoff(first_s=0.5, most_s=30.0)
        for turn in range(1, self._tries + 1):
            try:
                self._send(body)
            except ApplianceError as error:
                self.error = error.message
                if turn < self._tries and self._stop.wait(backoff.next_s()):
                    return
            except Exception:  # noqa: BLE001 - top of a thread: one event must not end the outlet
                self.error = "a defect of this program, see its log"
                _log.exception("%s: event %d", self.name, event.id)
                break
            else:
                self.error = ""
                self.sent += 1
                return
        self._drop()
        _log.warning("%s: event %d did not get out: %s", self.name, event.id, self.error)


def hook(program: str, *, deadline_s: float = HOOK_DEADLINE_S) -> Callable[[bytes], None]:
    """Returns what runs `program` (absolute path) for a notice."""

    def send(body: bytes) -> None:
        child.run([*_CLEAN, program], timeout_s=deadline_s, input=body)

    return send


def webhook(url: str, *, deadline_s: float = WEBHOOK_DEADLINE_S) -> Callable[[bytes], None]:
    """Returns what posts a notice to `url` (checked by the settings); https is verified by the system's roots."""
    parts = urlsplit(url)
    host, path = parts.hostname or "", (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": "application/json", "User-Agent": f"appliance/{__version__}"}

    def send(body: bytes) -> None:
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, parts.port, timeout=deadline_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=deadline_s)
        # The timeout is for each read; a peer that drips bytes is cut off as a whole.
        late = threading.Event()
        timer = threading.Timer(deadline_s, lambda: _cut(connection, late))
        timer.daemon = True
        timer.start()
        try:
            connection.request("POST", path, body=body, headers=headers)
            answer = connection.getresponse()
            answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"POST {url}: {str(error) or type(error).__name__}") from None
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():
            raise UnreachableError(f"POST {url}: no whole answer within {deadline_s:g} s")
        if not 200 <= answer.status < 300:
            raise UnreachableError(f"POST {url}: answered {answer.status}")

    return send


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    if connection.sock is not None:
        with contextlib.suppress(OSError):  # it ended by itself a moment ago
            connection.sock.shutdown(socket.SHUT_RDWR)


def outlets(*, program: str, url: str, cluster_id: str, node: int) -> list[Outlet]:
    """Returns the outlets that the settings ask for, not started."""
    found = []
    if program:
        found.append(Outlet("the events hook", hook(program), tries=1, cluster_id=cluster_id, node=node))
    if url:
        found.append(Outlet("the events webhook", webhook(url), tries=TRIES, cluster_id=cluster_id, node=node))
    return found
