"""The clock as a port: wall time, monotonic time, and whether the kernel believes its own wall time.

Durations are measured with `monotonic`; wall time is for people, records and certificates. A fresh VM may think it is
1970 or 2099, so whoever compares wall times asks `synchronised` first.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Protocol

_STA_UNSYNC = 0x0040
"""linux/timex.h; set until a time daemon disciplines the clock."""


class Clock(Protocol):
    """What time it is."""

    def now(self) -> float:
        """Wall time, seconds since 1970."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def synchronised(self) -> bool:
        """Whether the wall time is known to be right."""
        ...


SYNCHRONISED: dict[str, bool | None] = {"auto": None, "yes": True, "no": False}
"""What the setting `clock.synchronised` means to a `SystemClock`."""


class SystemClock:
    """This host's clock.

    Args:
        offset_s: added to the wall time (laboratory only).
        synchronised: overrides the kernel's opinion; None asks it.
    """

    def __init__(self, offset_s: float = 0.0, synchronised: bool | None = None) -> None:
        self._offset_s = offset_s
        self._synchronised = synchronised

    def now(self) -> float:
        """Wall time, seconds since 1970."""
        return time.time() + self._offset_s

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def synchronised(self) -> bool:
        """Whether the kernel calls its wall time synchronised; False when it can't be asked."""
        return _kernel_synchronised() if self._synchronised is None else self._synchronised


@functools.cache
def _adjtimex() -> Callable[[], tuple[int, int]] | None:
    """adjtimex(2), nothing set, as a call for its result and the status; None where the C library has none."""
    import ctypes  # some milliseconds, and needed once in a while only

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_byte * 256),  # the kernel writes 208 bytes in all
        )

    try:
        call = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None

    def ask() -> tuple[int, int]:
        timex = Timex()
        return call(ctypes.byref(timex)), timex.status

    return ask


def _kernel_synchronised() -> bool:
    ask = _adjtimex()
    if ask is None:
        return False
    result, status = ask()
    return result >= 0 and not status & _STA_UNSYNC
