"""The roles as systemd units: fitted to this machine's settings, installed, enabled, stopped.

The texts of the units are given by the caller; their user names, ports and the path of the program are the defaults,
and are replaced by what the settings say (`render`).
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from appliance.errors import ModeError
from appliance.paths import Paths
from appliance.protocol.address import format_endpoint, parse_endpoint
from appliance.protocol.seed import IMAGE_DIRECTORY
from appliance.runtime import child
from appliance.runtime.mode import STOP_TIMEOUT_S, BareMachine, Mode, stop_holder
from appliance.settings import Settings
from appliance.storage.atomic import make_dir, write_atomic

SYSUSERS = "appliance.sysusers"
PROGRAM = Path("/usr/bin/appliance")
"""What an image calls this program, and the units as they are shipped."""
CONSOLE = "appliance-console.path"
"""Shows the daemon's state line; starts the service of its name."""
UNITS: Mapping[Mode, tuple[str, ...]] = {
    Mode.CONTROLLER: (
        "appliance-gateway.socket",
        "appliance-enroll.socket",
        "appliance-reverse.socket",
        "appliance-controller.service",
        CONSOLE,
    ),
    Mode.SE: ("appliance-se.service", CONSOLE),
    Mode.NONE: (),
}
_PROGRESS_S = 5.0
_SYSTEMCTL_TIMEOUT_S = 360.0
"""More than the units take to start or to stop."""


def why_not_systemd(paths: Paths) -> str:
    """Returns why the units can't be used here, a clause; "" where they can."""
    if str(paths.root) != "/":
        return "this instance's root isn't /"
    if not Path("/run/systemd/system").is_dir():  # sd_booted(3)
        return "this machine wasn't booted with systemd"
    if os.geteuid() != 0:
        return "this takes root"
    return ""


def render(name: str, text: str, *, settings: Settings, command: Sequence[str]) -> str:
    """Returns a unit's text with this machine's users, ports and program. Pure."""
    users = {"aviseuser": settings.users.se, "avictlruser": settings.users.controller}
    text = re.sub("|".join(users), lambda match: users[match[0]], text)
    # % and $ mean something in ExecStart= (systemd.service(5)).
    start = shlex.join(command).replace("%", "%%").replace("$", "$$")
    text = text.replace("ExecStart=/usr/bin/appliance ", f"ExecStart={start} ")
    listen = {
        "appliance-gateway.socket": settings.controller.ssh_listen,
        "appliance-enroll.socket": settings.controller.enroll_listen,
        "appliance-reverse.socket": f"0.0.0.0:{settings.controller.reverse_port}",
    }.get(name)
    if listen is not None:
        endpoint = format_endpoint(*parse_endpoint(listen, default_port=0))
        text = re.sub(r"^ListenStream=.*$", lambda _: f"ListenStream={endpoint}", text, flags=re.MULTILINE)
    return text


def _installed_command() -> list[str]:
    """How units start this program: by the name that an image gives it, where that is this program."""
    command = child.self_command()
    if PROGRAM.exists() and PROGRAM.samefile(command[0]):
        return [str(PROGRAM), *command[1:]]
    return command


class SystemdMachine:
    """This machine with systemd, for root.

    Args:
        paths: of the instance.
        settings: users and ports that go into the units.
        units: file name to text, as shipped.
        progress: is told what goes on.
        etc: where the administrator's units lie.
        shipped: where an image's own units lie.
    """

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        *,
        units: Mapping[str, str],
        progress: Callable[[str], None],
        etc: Path = Path("/etc"),
        shipped: Path = Path("/usr/lib/systemd/system"),
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._units = units
        self._progress = progress
        self._unit_directory = etc / "systemd/system"
        self._shipped = shipped
        self._sysusers = etc / "sysusers.d/appliance.conf"

    def stop(self) -> list[str]:
        """Disables and stops the units of all roles, and a daemon that was started by hand."""
        known = dict.fromkeys(unit for units in UNITS.values() for unit in units)
        places = (self._unit_directory, self._shipped)
        installed = [unit for unit in known if any((place / unit).exists() for place in places)]
        if installed:
            self._progress("systemd drains and stops the running role")
            # The sockets too: the next SE's call would start the service again.
            self._systemctl("disable", "--now", *installed)
        stop_holder(self._paths, timeout_s=STOP_TIMEOUT_S, progress=self._progress)
        return []

    def enable(self, role: Mode) -> list[str]:
        """Makes users, directories and units of `role`, enables and starts it."""
        if role is Mode.NONE:
            return []
        self._make_users()
        user = self._settings.users.controller if role is Mode.CONTROLLER else self._settings.users.se
        directory = self._paths.controller_state if role is Mode.CONTROLLER else self._paths.se_state
        give(self._paths, directory, user)
        if role is Mode.SE and (seed := self._paths.root / IMAGE_DIRECTORY).is_dir():
            give(self._paths, seed, user)  # its daemon destroys the image key there
        names = (*UNITS[role], CONSOLE.replace(".path", ".service"))
        changed = [name for name in names if self._install(self._unit_directory / name, name)]
        self._systemctl("daemon-reload")
        if changed or self._lacks_socket(role):
            # What runs doesn't heed new units, and no socket can be opened beside its running daemon.
            self._systemctl("stop", *UNITS[role])
        self._progress(f"systemd starts the role {role}")
        self._systemctl("enable", "--now", *UNITS[role])
        return []

    def _lacks_socket(self, role: Mode) -> bool:
        sockets = [unit for unit in UNITS[role] if unit.endswith(".socket")]
        if not sockets:
            return False
        told = child.run(["systemctl", "is-active", *sockets], timeout_s=30.0, check=False).stdout.split()
        return told != ["active"] * len(sockets)

    def _make_users(self) -> None:
        self._install(self._sysusers, SYSUSERS)
        child.run(["systemd-sysusers", str(self._sysusers)], timeout_s=30.0)

    def _install(self, path: Path, name: str) -> bool:
        """Writes a file where it says something else than the one in force, and returns whether it does."""
        text = render(name, self._units[name], settings=self._settings, command=_installed_command()).encode()
        in_force = path if path.exists() else self._shipped / name
        if in_force.exists() and in_force.read_bytes() == text:
            return False
        make_dir(path.parent, mode=0o755)
        write_atomic(path, text, mode=0o644)
        return True

    def _systemctl(self, *arguments: str) -> None:
        """Runs systemctl, which waits until daemons are ready or gone, and tells every few seconds that it waits."""
        command = ["systemctl", "--no-ask-password", *arguments]
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(child.run, command, timeout_s=_SYSTEMCTL_TIMEOUT_S)
            began = time.monotonic()
            while wait([work], timeout=_PROGRESS_S).not_done:
                self._progress(f"systemd is at work, {time.monotonic() - began:.0f} s so far")
            work.result()


def give(paths: Paths, directory: Path, user: str) -> None:
    """Makes a role's directory and lock belong to its user, also what root made there (`controller init`).

    Raises:
        ModeError: there is no such user.
        StorageError: the directory can't be made.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ModeError(
            f"there is no user {user!r} on this machine",
            hint=f"`systemd-sysusers` makes it of {SYSUSERS}; see the setting in [users]",
            code="MODE-007",
        ) from None
    make_dir(directory, mode=0o700)
    for _, _, files, descriptor in os.fwalk(directory):
        os.fchown(descriptor, entry.pw_uid, entry.pw_gid)
        for name in files:
            _give_file(name, descriptor, entry)
    lock = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchown(lock, entry.pw_uid, entry.pw_gid)
    finally:
        os.close(lock)


def _give_file(name: str, directory: int, entry: pwd.struct_passwd) -> None:
    """Gives one plain file away; links stay, for what they lead to may be anybody's (root walks here)."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            os.chown(f"/proc/self/fd/{descriptor}", entry.pw_uid, entry.pw_gid)
    finally:
        os.close(descriptor)


def machine_of(
    paths: Paths, settings: Settings, *, units: Mapping[str, str], progress: Callable[[str], None]
) -> SystemdMachine | BareMachine:
    """Returns the machine as it is: with systemd's help where it can be had."""
    why = why_not_systemd(paths)
    if why:
        return BareMachine(paths, why=why, progress=progress)
    return SystemdMachine(paths, settings, units=units, progress=progress)
