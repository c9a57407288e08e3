"""Imports paramiko without what it can do without.

paramiko tries to import `invoke` for one feature of ssh_config files and takes its absence well. Where it is installed,
it brings ssl, yaml and six megabytes into a process whose memory is counted; so for this one import it isn't there.

It also asks `importlib.metadata` for its own version, to send it to whoever it connects to; that takes the email and
zip packages, 1.2 megabytes. So for this one import somebody else answers, and the far end isn't told the version.
"""

from __future__ import annotations

import logging
import sys
import types
from typing import Any


class _Metadata(types.ModuleType):
    """Stands for `importlib.metadata`."""

    @staticmethod
    def version(_package: str) -> str:
        """Nobody's business."""
        return "x"


_STAND_INS: dict[str, Any] = {
    "invoke": None,  # makes the import fail
    "importlib.metadata": _Metadata("importlib.metadata"),
}
_placed = [name for name, module in _STAND_INS.items() if sys.modules.setdefault(name, module) is module]
try:
    import paramiko
    import paramiko.packet
finally:
    for _name in _placed:
        del sys.modules[_name]

# What it logs as errors, with tracebacks, are ordinary ends of links; `se.tunnel` says each in one sentence.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

__all__ = ["paramiko"]
