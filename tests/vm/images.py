"""Runs `image-builder` of these sources for tests in virtual machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
AGENT = PROJECT / "dist/appliance"


def image_builder(*arguments: str | Path, timeout_s: float = 1200, check: bool = True) -> Any:
    """Runs `image-builder` of these sources."""
    line = [sys.executable, "-m", "image_builder", *map(str, arguments)]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=timeout_s, cwd=PROJECT, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done
