"""A controller for each module that asks for one: starting it takes a second, the attacks share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import RunningController, running


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    """A running controller that the module's tests share."""
    with running(tmp_path_factory.mktemp("controller") / "root") as found:
        yield found
