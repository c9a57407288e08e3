"""Virtual machines for tests: QEMU with TCG, since a nested KVM isn't to be had everywhere.

The disk under test is never written: the VM gets a qcow2 on top of it. The serial console is a log that tests wait on.
Ends only what it started.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pytest

Firmware = Literal["bios", "uefi"]
Disk = Literal["virtio", "nvme", "ide", "pvscsi"]

OVMF = Path("/usr/share/OVMF")
CPU = "max,la57=off"
"""All that TCG knows, but page tables of four levels: a fifth costs each look-up."""
BOOT_S = 420.0
"""Until a VM asks for a log-in. A first boot takes a minute on two idle cores, and several on busy ones."""
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])|\r")


def need_qemu() -> None:
    """Skips where QEMU or its firmware isn't here."""
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here: apt-get install {package}")


class Vm:
    """One virtual machine. Use as a context; entering starts it.

    Args:
        directory: for its files: overlay, console, monitor.
        disk: what it boots, left as it is.
        firmware: how.
        name: of its files.
        memory_mib: its memory.
        processors: how many it has.
        network: arguments of `-netdev` after `id`: `user,restrict=on` reaches nothing, `user` the host's loopback at
            10.0.2.2, `socket,…` another VM; empty for no network card.
        networks: further network cards, each as `network`; `eth1` and so on.
        card: QEMU's name of the first network card's kind.
        cdroms: ISO images, read-only.
        disks: further disk images, raw, read-only.
        attached: how the disk is attached.
        fresh: start over; False goes on with the overlay that an earlier VM of this directory and name left.
        size: of the disk, as `qemu-img resize` takes it; empty leaves it.
        smbios: value of `-smbios`, such as `type=1,uuid=…`.
    """

    def __init__(
        self,
        directory: Path,
        disk: Path,
        *,
        firmware: Firmware,
        name: str = "vm",
        memory_mib: int = 1024,
        processors: int = 2,
        network: str = "user,restrict=on",
        mac: str = "52:54:00:12:34:56",
        card: str = "virtio-net-pci",
        networks: Sequence[str] = (),
        cdroms: Sequence[Path] = (),
        disks: Sequence[Path] = (),
        attached: Disk = "virtio",
        fresh: bool = True,
        size: str = "",
        smbios: str = "",
    ) -> None:
        need_qemu()
        self.directory = directory
        self.overlay = directory / f"{name}.qcow2"
        self.console_log = directory / f"{name}.console"
        self._monitor = directory / f"{name}.monitor"
        self._errors = directory / f"{name}.stderr"
        self._process: subprocess.Popen[bytes] | None = None
        if fresh or not self.overlay.exists():
            self.overlay.unlink(missing_ok=True)
            form = json.loads(_run("qemu-img", "info", "--output=json", str(disk)))["format"]
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(disk.absolute()), "-F", form, str(self.overlay))
            if size:
                _run("qemu-img", "resize", "-q", str(self.overlay), size)
        self._arguments = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(processors),
            "-m", str(memory_mib), "-display", "none", "-device", "virtio-rng-pci", "-rtc", "base=utc",
            "-chardev", f"file,id=console,path={_escaped(self.console_log)}", "-serial", "chardev:console",
            "-qmp", f"unix:{_escaped(self._monitor)},server=on,wait=off",
            *_disk(self.overlay, attached),
            *(_network(network, mac, card=card) if network else ["-nic", "none"]),
            *(word for number, one in enumerate(networks) for word in _network(one, f"{mac[:-2]}f{number}", number)),
            *(["-smbios", smbios] if smbios else []),
        ]  # fmt: skip
        for number, path in enumerate(cdroms):
            self._arguments += ["-drive", f"file={_escaped(path)},media=cdrom,format=raw,if=ide,index={number + 2}"]
        for number, path in enumerate(disks):
            drive = f"file={_escaped(path)},format=raw,if=none,id=extra{number},readonly=on"
            self._arguments += ["-drive", drive, "-device", f"virtio-blk-pci,drive=extra{number}"]
        if firmware == "uefi":
            self._arguments += self._firmware(name)

    def _firmware(self, name: str) -> list[str]:
        code, variables = OVMF / "OVMF_CODE_4M.fd", OVMF / "OVMF_VARS_4M.fd"
        if not code.exists():
            pytest.skip("UEFI firmware is not here: apt-get install ovmf")
        own = self.directory / f"{name}.vars"
        if not own.exists():
            shutil.copyfile(variables, own)
        flash = "if=pflash,format=raw"
        return ["-drive", f"{flash},readonly=on,file={code}", "-drive", f"{flash},file={_escaped(own)}"]

    def __enter__(self) -> Self:
        self.console_log.write_bytes(b"")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                self._arguments, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of QEMU."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Cuts the power."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._process.wait()

    def console(self) -> str:
        """What the VM wrote to its serial console, without colours."""
        return _ESCAPES.sub("", self.console_log.read_text("utf-8", "replace"))

    def wait_for(self, pattern: str, *, deadline_s: float = BOOT_S, count: int = 1) -> str:
        """Polls the console until it shows `pattern` `count` times, and returns the last match."""
        assert self._process is not None
        end = time.monotonic() + deadline_s
        while True:
            found = list(re.finditer(pattern, self.console(), re.MULTILINE))
            if len(found) >= count:
                return found[count - 1][0]
            if self._process.poll() is not None:
                pytest.fail(f"QEMU ended with {self._process.returncode}: {self._errors.read_text()}\n{self._tail()}")
            if time.monotonic() > end:
                pytest.fail(f"the console didn't show {pattern!r} within {deadline_s} s:\n{self._tail()}")
            time.sleep(0.2)

    def wait_off(self, *, deadline_s: float = 120.0) -> None:
        """Waits until the VM has switched itself off."""
        assert self._process is not None
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still on after {deadline_s} s:\n{self._tail()}")

    def power_button(self) -> None:
        """Presses it: the VM shuts down by itself."""
        self._command("system_powerdown")

    def reset(self) -> None:
        """Presses the reset button: no file system is unmounted."""
        self._command("system_reset")

    def set_link(self, *, up: bool) -> None:
        """Plugs the network cable in or out."""
        self._command("set_link", name="net", up=up)

    def _command(self, execute: str, **arguments: Any) -> None:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as monitor:
            monitor.settimeout(30)
            monitor.connect(str(self._monitor))
            with monitor.makefile("rw") as stream:
                stream.readline()  # greeting
                for line in ({"execute": "qmp_capabilities"}, {"execute": execute, "arguments": arguments}):
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
                    while "event" in (answer := json.loads(stream.readline())):
                        pass
                    assert "return" in answer, answer

    def raw_disk(self) -> Path:
        """The VM's disk as it is now, as a raw file; the VM should be off."""
        raw = self.overlay.with_suffix(".raw")
        _run("qemu-img", "convert", "-O", "raw", str(self.overlay), str(raw))
        return raw

    def _tail(self) -> str:
        return self.console()[-4000:]


def _run(*arguments: str) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=600).stdout


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _network(network: str, mac: str, number: int | str = "", *, card: str = "virtio-net-pci") -> list[str]:
    kind, _, rest = network.partition(",")
    backend = f"{kind},id=net{number}" + (f",{rest}" if rest else "")
    return ["-netdev", backend, "-device", f"{card},netdev=net{number},mac={mac}"]


def _disk(path: Path, attached: Disk) -> list[str]:
    drive = ["-drive", f"file={_escaped(path)},format=qcow2,if=none,id=root,discard=unmap"]
    devices = {
        "virtio": ["virtio-blk-pci,drive=root,bootindex=1"],
        "nvme": ["nvme,drive=root,serial=root,bootindex=1"],
        "ide": ["ide-hd,drive=root,bootindex=1"],
        "pvscsi": ["pvscsi,id=scsi", "scsi-hd,drive=root,bus=scsi.0,bootindex=1"],
    }
    return [*drive, *(word for device in devices[attached] for word in ("-device", device))]
