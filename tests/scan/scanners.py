"""Runs scanners of third parties from their own environment, `.venv-scan`, which `scripts/test` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = PROJECT / ".venv-scan" / "bin"


def run(program: str, *args: str, timeout_s: float = 120, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one scanner; its exit code is the caller's to judge. Skips where the environment isn't made."""
    path = PROGRAMS / program
    if not path.exists():
        pytest.skip(f"{program} is not in .venv-scan; `scripts/test tests/scan` makes it from requirements/scan.txt")
    plain = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        [str(path), *args],
        capture_output=True, text=True, timeout=timeout_s, cwd=cwd, stdin=subprocess.DEVNULL, check=False,
        env={**plain, "NO_COLOR": "1"},
    )  # fmt: skip
