"""Lets the role of an image start by itself: the mode is written before systemd comes to the daemon's unit.

The unit is enabled in the image and waits for the mode's file, so nothing is asked of systemd while it boots. Where
programs of the image come first (hooks), cloud-init's `appliance mode set` starts the role; a power cut between may
have taken that away for good, so the next boot does it here.
"""

from __future__ import annotations

import pwd

import msgspec

from appliance.paths import Paths
from appliance.runtime import mode
from appliance.runtime.clock import Clock
from appliance.runtime.mode import Mode
from appliance.runtime.units import give
from appliance.settings import Settings
from appliance.storage.atomic import read_limited

DESCRIPTION_FILE = "usr/lib/appliance-image.json"
_MAX_BYTES = 4 << 20


class _Described(msgspec.Struct, frozen=True):
    role: str


def of_image(paths: Paths) -> Mode:
    """Returns whose image this is; NONE where it doesn't say."""
    try:
        raw = read_limited(paths.root / DESCRIPTION_FILE, max_bytes=_MAX_BYTES)
        return Mode(msgspec.json.decode(raw, type=_Described).role)
    except (FileNotFoundError, ValueError, msgspec.MsgspecError):
        return Mode.NONE


def is_due(*, role: Mode, is_told: bool, has_hooks: bool, is_later_boot: bool) -> bool:
    """Whether the role is to be set now: an SE's, where nobody did it yet and no hook of this boot comes first.

    Args:
        role: of the image.
        is_told: the machine has a mode, be it none.
        has_hooks: see `first_boot.Record`.
        is_later_boot: later than the one that took the seed.
    """
    return role is Mode.SE and not is_told and (is_later_boot or not has_hooks)


def user_of(settings: Settings) -> tuple[int, int] | None:
    """Returns user and group of the SE's daemon; None where there is no such user."""
    try:
        entry = pwd.getpwnam(settings.users.se)
    except KeyError:
        return None
    return entry.pw_uid, entry.pw_gid


class _BootingMachine:
    """A machine whose systemd hasn't come to the daemons yet."""

    def __init__(self, paths: Paths, settings: Settings) -> None:
        self._paths = paths
        self._settings = settings

    def stop(self) -> list[str]:
        """Nothing runs yet."""
        return []

    def enable(self, role: Mode) -> list[str]:  # noqa: ARG002 - an SE's
        """Makes what the unit expects."""
        give(self._paths, self._paths.se_state, self._settings.users.se)
        return []


def start(paths: Paths, settings: Settings, clock: Clock) -> None:
    """Makes this machine an SE; its daemon's unit, enabled in the image, starts later in this boot.

    Raises:
        ModeError: its user is missing.
        StorageError: the mode can't be written.
    """
    machine = _BootingMachine(paths, settings)
    for _ in mode.change(paths, Mode.SE, machine, clock=clock, force=False, count_enrolled=lambda: 0):
        pass
