"""Paths are all below one root, and absolute."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.paths import Paths

_NAMES = [name for name, value in vars(Paths).items() if isinstance(value, property)]


@pytest.mark.parametrize("name", _NAMES)
def test_everything_lies_below_the_root(name: str, tmp_path: Path) -> None:
    assert getattr(Paths(tmp_path), name).is_relative_to(tmp_path)


def test_an_appliance_has_the_documented_places() -> None:
    paths = Paths(Path("/"))
    assert str(paths.settings_file) == "/etc/appliance/settings.toml"
    assert str(paths.mode_file) == "/var/lib/appliance/mode"
    assert str(paths.controller_state) == "/var/lib/appliance/controller"
    assert str(paths.se_state) == "/var/lib/appliance/se"
    assert str(paths.controller_socket) == "/run/appliance/controller.sock"
    assert str(paths.forward_socket) == "/run/appliance/channel.sock"


def test_a_relative_root_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = Paths(Path("lab"))
    monkeypatch.chdir("/")
    assert paths.state == tmp_path / "lab/var/lib/appliance"
