"""The stop token: replaces every sleep, and is how a daemon's threads learn that it is over.

A child token stops when its parent does, not the other way round. Callbacks run once, in the thread that stops; one
registered after the fact runs at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterator


class StopToken:
    """Says whether, and why, to stop. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._reason = ""
        self._callbacks: list[Callable[[], object]] = []
        # Weak, or each link of months of redialling would stay in its parent's list for ever.
        self._children: weakref.WeakSet[StopToken] = weakref.WeakSet()
        self._parent: StopToken | None = None

    @property
    def stopped(self) -> bool:
        """Whether it is over."""
        return self._event.is_set()

    @property
    def reason(self) -> str:
        """Why it is over; "" while it isn't."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Stops this token and its children. The first reason stays; a second call does nothing."""
        with self._lock:
            if self._event.is_set():
                return
            self._reason = reason
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
            children = list(self._children)
        for child in children:
            child.stop(reason)
        for callback in callbacks:
            callback()

    def wait(self, timeout_s: float | None) -> bool:
        """Waits until stopped, at most `timeout_s` (None: without end). Returns whether it is over."""
        return self._event.wait(timeout_s)

    def child(self) -> StopToken:
        """Returns a token that stops when this one does. It keeps this one alive, not the other way round."""
        child = StopToken()
        child._parent = self  # a chain must not be cut because somebody dropped its middle
        with self._lock:
            if not self._event.is_set():
                self._children.add(child)
                return child
        child.stop(self._reason)
        return child

    def on_stop(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Calls `callback` when stopped. Returns what takes the callback back (harmless after it ran)."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return lambda: self._forget(callback)
        callback()
        return lambda: None

    def _forget(self, callback: Callable[[], object]) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)


@contextlib.contextmanager
def stop_on_signals(
    token: StopToken, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[None]:
    """Stops `token` on a signal while the context lasts; afterwards the former dispositions are back.

    Only for the main thread of a threaded daemon (asyncio has `add_signal_handler`).
    """

    def stop(number: int, _frame: object) -> None:
        # A thread of its own: the interrupted main thread may hold the very locks that stop() needs.
        name = signal.Signals(number).name
        threading.Thread(target=token.stop, args=(f"got {name}",), name=f"stop on {name}", daemon=True).start()

    former = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, disposition in former.items():
            signal.signal(number, disposition)
