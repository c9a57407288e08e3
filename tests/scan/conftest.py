"""A controller for each scan: the one of the operator API revokes, drains and changes what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import RunningController, running


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[RunningController]:
    """A running controller; scanners are louder than its rate limits allow."""
    loud = {"enroll_rate_per_s": 10_000.0, "source_rate_per_s": 10_000.0}
    with running(tmp_path / "root", settings=loud) as found:
        yield found
