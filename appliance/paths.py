"""Where everything lies on disk, relative to one root, so that any number of instances can run side by side.

Nothing here touches the disk; each owner makes its own directories. On an appliance the root is `/`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Paths:
    """All paths below `root` (made absolute, since daemons change their working directory)."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    @property
    def settings_file(self) -> Path:
        """This process's local settings, TOML."""
        return self.root / "etc/appliance/settings.toml"

    @property
    def state(self) -> Path:
        """What survives a reboot."""
        return self.root / "var/lib/appliance"

    @property
    def mode_file(self) -> Path:
        """Which role this machine plays, and how far a change of it got."""
        return self.state / "mode"

    @property
    def mode_lock(self) -> Path:
        """Held while the mode is being changed."""
        return self.state / "mode.lock"

    @property
    def first_boot_file(self) -> Path:
        """How far first boot got."""
        return self.state / "first-boot"

    @property
    def lock(self) -> Path:
        """Held by the one daemon that works on this root."""
        return self.state / "lock"

    @property
    def se_state(self) -> Path:
        """State of the SE role."""
        return self.state / "se"

    @property
    def controller_state(self) -> Path:
        """State of the controller role."""
        return self.state / "controller"

    @property
    def cluster_file(self) -> Path:
        """What cluster this controller is of."""
        return self.controller_state / "cluster.json"

    @property
    def store_file(self) -> Path:
        """The controller's store, SQLite."""
        return self.controller_state / "store.sqlite"

    @property
    def run(self) -> Path:
        """Sockets and other things that a reboot may take."""
        return self.root / "run/appliance"

    @property
    def controller_socket(self) -> Path:
        """Operator API of the controller."""
        return self.run / "controller.sock"

    @property
    def controller_file(self) -> Path:
        """Which ports the running controller bound, JSON."""
        return self.run / "controller.json"

    @property
    def se_socket(self) -> Path:
        """Local API of the SE."""
        return self.run / "se.sock"

    @property
    def forward_socket(self) -> Path:
        """Connections made here become channels to named controller services."""
        return self.run / "channel.sock"

    @property
    def health_file(self) -> Path:
        """The running daemon's health, JSON."""
        return self.run / "health.json"

    @property
    def log(self) -> Path:
        """Directory of log files."""
        return self.root / "var/log/appliance"
