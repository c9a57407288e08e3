"""Keeps this process out of core files: a daemon's memory holds private keys, and a core file lies about for years.

Both ways are taken. The limit is inherited by children, but doesn't hold where the kernel pipes cores to a program.
There the flag does, which also keeps other processes of the same user from reading this memory; it is lost by exec, so
each daemon sets it when it begins.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4
"""linux/prctl.h, see prctl(2)."""

_log = logging.getLogger(__name__)


def forbid() -> None:
    """Forbids core dumps of this process, and reading its memory to all but root. Never fails; tells what it can't."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except OSError as error:
        # The unit's system call filter may forbid it; the unit then sets the limit itself.
        _log.debug("the limit on core files can't be set: %s", error.strerror)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        _log.warning("core dumps of this process can't be forbidden: %s", os.strerror(ctypes.get_errno()))
