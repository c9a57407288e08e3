"""Core files: forbidden twice, since the limit doesn't hold for cores that the kernel pipes to a program."""

from __future__ import annotations

import subprocess
import sys

PR_GET_DUMPABLE = 3

TELL = f"""
import ctypes, resource
from appliance.runtime import core_dump
{{}}
core_dump.forbid()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0))
"""


def told(before: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", TELL.format(before)]
    return subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)


def test_both_ways_are_shut() -> None:
    assert told().stdout == "(0, 0) 0\n"


def test_a_limit_that_may_not_be_set_leaves_the_flag() -> None:
    """What the unit's system call filter does."""
    refuse = "def no(*_): raise PermissionError(1, 'Operation not permitted')\nresource.setrlimit = no"
    assert told(refuse).stdout.endswith(" 0\n")


def test_a_kernel_that_refuses_is_told() -> None:
    refuse = "class Libc:\n    def prctl(self, *_): return -1\nctypes.CDLL = lambda *_, **__: Libc()"
    # The one that answers "dumpable?" afterwards is the false one too.
    assert "can't be forbidden" in told(refuse).stderr
