"""The one place that starts other programs: cleaned environment, deadline, and a failure one can paste into a shell.

A frozen program leaks its own library path into what it starts (`ssh`, `sshd`, `qemu-img` then load our libcrypto), and
a daemon under systemd its notification socket; `clean_environment` takes both out. Children get a session of their
own: no terminal to ask questions on, and a group that can be killed as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appliance.errors import ChildError

_TAIL_CHARS = 2000
_REST_S = 1.0
_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
"""Searched after PATH: an ordinary user's PATH on Debian lacks the sbin directories, where sshd lives."""
_PACKAGES = {
    "curl": "curl",
    "cloud-init": "cloud-init",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "growpart": "cloud-guest-utils",
    "mcopy": "mtools",
    "mformat": "mtools",
    "minfo": "mtools",
    "mke2fs": "e2fsprogs",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsvg-convert": "librsvg2-bin",
    "sfdisk": "fdisk",
    "sgdisk": "gdisk",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ssh-keyscan": "openssh-client",
    "sshd": "openssh-server",
    "syslinux": "syslinux",
    "systemctl": "systemd",
    "systemd-analyze": "systemd",
    "tar": "tar",
    "unshare": "util-linux",
    "xorriso": "xorriso",
}
"""Program to the Debian package that has it."""


@dataclasses.dataclass(frozen=True)
class Completed:
    """A program that ended. Output is decoded as UTF-8, what isn't replaced."""

    args: tuple[str, ...]
    returncode: int
    """Negative: the signal that killed it."""
    stdout: str
    stderr: str


def clean_environment(env: Mapping[str, str] = os.environ, *, frozen: bool | None = None) -> dict[str, str]:
    """Returns `env` as it was before this program was unpacked and started by systemd.

    `X_ORIG`, which the bootloader leaves behind, becomes `X` again; its own variables, systemd's per-process ones and,
    in a frozen program, LD_LIBRARY_PATH and PYTHON* go. Unfrozen, PYTHON* stay: our own children are that interpreter.
    """
    is_frozen = getattr(sys, "frozen", False) if frozen is None else frozen
    dropped = ("_MEI", "_PYI", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", *(("PYTHON",) if is_frozen else ()))
    cleaned = {name: value for name, value in env.items() if not name.startswith(dropped)}
    for name in ("LD_LIBRARY_PATH", "LIBPATH"):
        original = cleaned.pop(f"{name}_ORIG", None)
        if original is not None:
            cleaned[name] = original
        elif is_frozen:
            cleaned.pop(name, None)
    return cleaned


def find_program(name: str) -> str | None:
    """Returns the path of a program from PATH or the system's directories, or None."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_DIRECTORIES)


def package_of(name: str) -> str:
    """Returns the Debian package that has a program; "" where that isn't known."""
    return _PACKAGES.get(name, "")


def self_command() -> list[str]:
    """Returns how to start this program itself."""
    return [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "appliance"]


def run(
    args: Sequence[str],
    *,
    timeout_s: float,
    input: str | bytes | None = None,  # noqa: A002 - as in subprocess
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Completed:
    """Runs a program to its end.

    Args:
        args: program and arguments; no shell.
        timeout_s: after it the program and all that it started are killed.
        input: for its stdin, which is otherwise empty.
        cwd: working directory.
        env: goes on top of our own environment, cleaned.
        check: whether an exit code other than 0 is an error.

    Raises:
        ChildError: missing program, deadline, or exit code; with the command to paste and the end of its stderr.
    """
    with (
        _signals_wait() as deliver,
        _start(
            args,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**clean_environment(), **(env or {})},
        ) as process,
    ):
        try:
            deliver()
            stdout, stderr = process.communicate(input.encode() if isinstance(input, str) else input, timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            stderr = _rest(process)
            raise _failure(args, f"didn't end within {timeout_s:g} s", stderr) from None
        except BaseException:
            _kill_group(process)
            raise
    if check and process.returncode != 0:
        raise _failure(args, _describe(process.returncode), stderr)
    return Completed(tuple(args), process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


class Daemon:
    """A long-running child, started by the constructor; leaving its context terminates it.

    Args:
        args: program and arguments.
        log_path: its stdout and stderr are appended here (0600).
        pass_fds: descriptors that it gets under the same numbers.
        env: whole environment; by default ours, cleaned.

    Raises:
        ChildError: it couldn't be started.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        log_path: Path,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.args = tuple(args)
        self.log_path = log_path
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with _signals_wait() as deliver:
            try:
                self._process = _start(
                    args,
                    stdin=subprocess.DEVNULL,
                    stdout=log_fd,
                    stderr=log_fd,
                    pass_fds=pass_fds,
                    env=env,
                )
            finally:
                os.close(log_fd)
            try:
                deliver()
            except BaseException:
                self.terminate(0.0)
                raise
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code (negative: signal), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Waits for its end, at most `timeout_s`. Returns as `poll`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def terminate(self, timeout_s: float) -> int:
        """SIGTERM, and SIGKILL to its whole group where it still lives `timeout_s` later. Returns the exit code."""
        self._process.terminate()
        code = self.wait(timeout_s)
        if code is None:
            _kill_group(self._process)
            code = self._process.wait()
        return code

    def detach(self) -> int:
        """Lets it live on after us, for commands that leave daemons behind. Returns its pid; the object is done."""
        # Popen warns when it is dropped while its child runs, unless it believes that the child ended.
        self._process.returncode = 0
        return self.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate(5.0)


@contextlib.contextmanager
def _signals_wait() -> Iterator[Callable[[], None]]:
    """Keeps Ctrl-C and SIGTERM waiting until the function that it yields is called, or the context is left.

    What their handlers raise between the fork and the first line that knows the process would leave the child running,
    with nobody to end it. A child isn't touched by this: handlers don't outlive exec. Other threads are never
    interrupted by handlers, so for them it does nothing.
    """
    came: list[int] = []
    former: dict[int, Any] = {}

    def deliver() -> None:
        for number, disposition in former.items():
            signal.signal(number, disposition)
        former.clear()
        while came:
            signal.raise_signal(came.pop())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                former[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield deliver
    finally:
        deliver()


def _start(
    args: Sequence[str],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    program = find_program(args[0])
    if program is None:
        package = package_of(Path(args[0]).name)
        hint = f"apt-get install {package}" if package else "install it, or put it on the PATH"
        raise ChildError(f"the program {args[0]!r} isn't on this machine", hint=hint)
    try:
        return subprocess.Popen(
            [program, *args[1:]],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            env=clean_environment() if env is None else dict(env),
            start_new_session=True,
        )
    except OSError as error:
        raise _failure(args, f"couldn't be started: {error.strerror}: {error.filename}", b"") from error


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _rest(process: subprocess.Popen[bytes]) -> bytes:
    """Returns what a killed program had said; one that left its group may keep the pipe open for ever."""
    try:
        return process.communicate(timeout=_REST_S)[1]
    except subprocess.TimeoutExpired:
        return b""


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def _failure(args: Sequence[str], what: str, stderr: bytes) -> ChildError:
    tail = stderr.decode(errors="replace").strip()[-_TAIL_CHARS:]
    message = f"{Path(args[0]).name} {what}" + (f":\n{tail}" if tail else "")
    return ChildError(message, hint=f"to see it yourself: {shlex.join(args)}")
