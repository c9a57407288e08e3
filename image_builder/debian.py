"""Debian packages as a tree: the part of our own minimal system that `mmdebstrap` makes, as one reproducible tar.

It holds no host key, no machine id, no log, no package source and nothing of the machine that made it. Where packages
come from is the matter of this machine's apt configuration, or of files that the caller names.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.errors import ChildError, ImageError
from appliance.runtime import child
from image_builder.steps import Steps

RELEASE = "bookworm"
"""Debian 12."""
PACKAGES = (
    "chrony",
    "cloud-guest-utils",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "linux-image-cloud-amd64",
    "openssh-server",
    "sudo",
    "systemd-boot-efi",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "zstd",
)
"""`systemd-boot-efi` is the UEFI loader that goes onto the ESP. No `open-vm-tools`: 60 MB of libraries for one call."""
USERS = {"aviseuser": 980, "avictlruser": 981}

_APT = Path("/etc/apt")
_TIMEOUT_S = 1800.0

# Runs outside the new tree, which is $1; $SOURCE_DATE_EPOCH is set.
_CUSTOMISE = f"""set -eu
root="$1"
inside() {{ chroot "$root" "$@"; }}
inside useradd --system --uid {USERS["aviseuser"]} --user-group --no-create-home \\
    --home-dir /var/lib/appliance/se --shell /bin/sh --comment 'Appliance service engine' aviseuser
inside useradd --system --uid {USERS["avictlruser"]} --user-group --no-create-home \\
    --home-dir /var/lib/appliance/controller --shell /usr/sbin/nologin --comment 'Appliance controller' avictlruser
inside update-initramfs -c -k all >/dev/null # once, not also after each package that asks for it (INITRD=No below)
inside systemctl --quiet enable systemd-networkd.service systemd-resolved.service chrony.service ssh.service
inside systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer dpkg-db-backup.timer
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
ln -sf /usr/share/zoneinfo/Etc/UTC "$root/etc/localtime"
: >"$root/etc/machine-id" # not "uninitialized": presets would undo what was enabled above
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname" "$root"/etc/*- "$root/var/lib/dbus/machine-id"
rm -f "$root/var/lib/systemd/random-seed" "$root/var/cache/ldconfig/aux-cache" "$root"/var/cache/debconf/*-old
rm -f "$root"/var/lib/dpkg/*-old "$root/etc/apt/sources.list" "$root"/etc/apt/sources.list.d/*
# for the build alone: packages that are installed later shall survive a power cut
sed -i '/^force-unsafe-io$/d' "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
find "$root/usr/share/doc" -type f ! -name copyright -delete # of the packages that _NO_DOCUMENTS came too late for
find "$root/usr/share/doc" -xtype l -delete
find "$root/usr/share/doc" -mindepth 1 -type d -empty -delete
rm -rf "$root"/var/log/apt "$root"/var/log/runit "$root"/var/lib/apt/lists/* "$root"/usr/share/man/*
# nothing below /tmp: mmdebstrap keeps its APT_CONFIG there, without which its last steps would clean this machine's apt
find "$root/var/log" -type f ! -name README -delete
# the day of the last change of a password: that of the build
sed -i "s/^\\([^:]*:[^:]*\\):[0-9]*:/\\1:$((SOURCE_DATE_EPOCH / 86400)):/" "$root/etc/shadow"
"""

# Written once dpkg is there: as --dpkgopt, mmdebstrap would put each package that it unpacks by itself, some seventy,
# through a filter of its own in Python, a tenth of the whole time.
_NO_DOCUMENTS = """set -eu
cat >"$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap" <<END
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
force-unsafe-io
END
"""


class Package(msgspec.Struct, frozen=True):
    """One installed Debian package."""

    name: str
    version: str
    architecture: str
    source: str


def sources(files: Sequence[Path] = ()) -> dict[str, str]:
    """Returns apt sources by file ending (`list`, `sources`).

    Args:
        files: taken whole; empty takes those of this machine's configuration that serve Debian 12.

    Raises:
        ImageError: there are none.
    """
    chosen = list(files) or [
        path
        for path in [_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*"))]
        if path.suffix in {".list", ".sources"} and path.is_file()
    ]
    found: dict[str, list[str]] = {"list": [], "sources": []}
    for path in chosen:
        kind = path.suffix.removeprefix(".")
        if kind not in found:
            raise ImageError(f"{path}: a file of apt sources ends in .list or .sources (sources.list(5))")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ImageError(f"the apt sources {path} can't be read: {error.strerror}") from error
        parts = text.splitlines() if kind == "list" else re.split(r"\n\s*\n", text)
        found[kind] += [part for part in parts if part.strip() and (files or _serves_release(part, kind))]
    if not any(found.values()):
        raise ImageError(
            f"this machine's apt configuration has no source of Debian {RELEASE}",
            hint="name a file of sources with --sources FILE (sources.list(5))",
        )
    joiner = {"list": "\n", "sources": "\n\n"}
    return {kind: joiner[kind].join(parts) + "\n" for kind, parts in found.items() if parts}


def _serves_release(part: str, kind: str) -> bool:
    suite = rf"{RELEASE}(-updates|-security)?/?"
    if kind == "list":
        return re.fullmatch(rf"\s*deb\s+(\[[^\]]*\]\s+)?\S+\s+{suite}\s+.*", part) is not None
    fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", part, re.MULTILINE))
    named = {name.lower(): value for name, value in fields.items()}
    return (
        "deb" in named.get("types", "").split()
        and named.get("enabled", "yes").lower() not in {"no", "false", "0", "off"}
        and any(re.fullmatch(suite, one) for one in named.get("suites", "").split())
    )


def recipe(texts: dict[str, str], extra: Sequence[str]) -> dict[str, object]:
    """Returns all that decides what `install` makes, apart from the state of the archive; for a cache's key."""
    return {
        "release": RELEASE,
        "packages": [*PACKAGES, *sorted(extra)],
        "hooks": [_NO_DOCUMENTS, _CUSTOMISE],
        "sources": texts,
    }


def install(tar: Path, texts: dict[str, str], *, extra: Sequence[str], epoch: int, steps: Steps) -> None:
    """Installs the packages and writes the tree.

    Args:
        tar: to be made; the work lies beside it.
        texts: from `sources`.
        extra: packages besides our own.
        epoch: date of what the build makes, seconds since 1970.
        steps: is told what goes on.

    Raises:
        ChildError: mmdebstrap failed or isn't here.
    """
    mirrors = []
    for kind, text in texts.items():
        path = tar.with_name(f"apt.{kind}")
        path.write_text(text, encoding="utf-8")
        mirrors.append(str(path))
    is_root = os.geteuid() == 0
    env = {"SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8", "TZ": "UTC", "INITRD": "No"}
    if is_root:
        env["TMPDIR"] = str(tar.parent)  # in a user name space its root couldn't go through our 0700 folder
    try:
        with steps.step(f"install Debian {RELEASE}", watch=tar, expected_bytes=None):
            child.run(
                [
                    "mmdebstrap",
                    f"--mode={'root' if is_root else 'unshare'}",
                    "--variant=minbase",
                    "--format=tar",
                    f"--include={','.join([*PACKAGES, *sorted(extra)])}",
                    '--aptopt=APT::Install-Recommends "false"',
                    f"--extract-hook={_NO_DOCUMENTS}",
                    f"--customize-hook={_CUSTOMISE}",
                    RELEASE,
                    str(tar),
                    *mirrors,
                ],
                timeout_s=_TIMEOUT_S,
                env=env,
            )
    except ChildError as error:
        hint = error.hint
        if "isn't on this machine" not in error.message:
            hint = f"are the package sources reachable? they are in {', '.join(texts)} form; {error.hint[:200]}"
        raise ChildError(error.message, hint=hint) from error


def packages(tree: tarfile.TarFile) -> list[Package]:
    """Returns what is installed in a tree, by name."""
    status = member(tree, "var/lib/dpkg/status").decode("utf-8", "replace")
    found = []
    for stanza in status.split("\n\n"):
        fields: dict[str, str] = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            source = fields.get("Source", fields["Package"]).split()[0]
            found.append(Package(fields["Package"], fields["Version"], fields["Architecture"], source))
    return sorted(found, key=lambda package: (package.name, package.architecture))


def member(tree: tarfile.TarFile, name: str) -> bytes:
    """Returns a file of a tree.

    Raises:
        ImageError: it isn't there.
    """
    try:
        stream = tree.extractfile(f"./{name}")
    except KeyError:
        stream = None
    if stream is None:
        raise ImageError(f"the system that was installed has no {name}", hint="build it anew with --fresh")
    return stream.read()


def upstream(version: str) -> tuple[int, int]:
    """Returns the first two numbers of a Debian version, `1:9.2p1-2` gives (9, 2)."""
    match = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
