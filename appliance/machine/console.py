"""Lines on the consoles of this machine, all of them: whoever looks at a VM looks at one, and nobody knows at which."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MAX_CHARS = 400


def say(text: str, *, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
    """Writes one line to each console that the kernel uses. A console that doesn't take it isn't waited for.

    Args:
        text: what can't be printed becomes `?`.
        sys: where sysfs is.
        dev: where devices are.
    """
    line = "".join(c if c.isprintable() and c.isascii() else "?" for c in text[:MAX_CHARS])
    try:
        names = (sys / "class/tty/console/active").read_text("ascii").split()
    except (OSError, UnicodeDecodeError):
        return
    for name in names:
        with contextlib.suppress(OSError):
            descriptor = os.open(dev / name, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"\r\nappliance: {line}\r\n".encode())
            finally:
                os.close(descriptor)
