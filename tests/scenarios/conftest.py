"""Fixtures of all scenarios."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short name in place of the test's: a unix socket's path has room for 107 bytes."""
    return tmp_path_factory.mktemp("s")
