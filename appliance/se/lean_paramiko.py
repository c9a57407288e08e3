"""Imports paramiko without what it can do without.

paramiko tries to import `invoke` for one feature of ssh_config files and takes its absence well. Where it is installed,
it brings ssl, yaml and six megabytes into a process whose memory is counted; so for this one import it isn't there.
"""

from __future__ import annotations

import logging
import sys

_MISSING = sys.modules.setdefault("invoke", None) is None  # type: ignore[arg-type]  # None makes the import fail
try:
    import paramiko
    import paramiko.packet
finally:
    if _MISSING:
        del sys.modules["invoke"]

# What it logs as errors, with tracebacks, are ordinary ends of links; `se.tunnel` says each in one sentence.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

__all__ = ["paramiko"]
