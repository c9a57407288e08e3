"""How a kernel that is installed in a VM reaches the boot partition, which no running system has mounted.

A script of our own system, called by dpkg's kernel hooks and by update-initramfs after their own work. It writes whole
files under new names, then turns the two small loader files to them, so that a cut leaves the old kernel or the new.
"""

from __future__ import annotations

SCRIPT_FILE = "usr/sbin/appliance-kernel-update"
HOOKS = (
    "etc/kernel/postinst.d/zz-appliance",
    "etc/kernel/postrm.d/zz-appliance",
    "etc/initramfs/post-update.d/zz-appliance",
)
"""Links to the script; zz, since the hooks run by name and the initrd must be there."""
LOADER_FILES = ("loader/entries/appliance.conf", "syslinux.cfg")


def script(*, esp_name: str) -> str:
    """Returns the shell script.

    Args:
        esp_name: GPT name of the boot partition; the one on the disk of the root file system is taken.
    """
    return f"""\
#!/bin/sh
# Puts the newest kernel and its initrd onto the boot partition, from which BIOS and UEFI start this system, and takes
# kernels away that are no longer installed. Called by kernel hooks, whose arguments aren't needed.
# APPLIANCE_BOOT, APPLIANCE_ESP: directories to take instead of /boot and of the boot partition.
set -eu
boot=${{APPLIANCE_BOOT:-/boot}}
esp=${{APPLIANCE_ESP:-}}
say() {{ echo "appliance-kernel-update: $*" >&2; }}
if [ -z "$esp" ]; then
    disk=$(lsblk -no PKNAME "$(findmnt -no SOURCE /)" 2>/dev/null | head -n 1)
    [ -z "$disk" ] || part=$(lsblk -rno PATH,PARTLABEL "/dev/$disk" | sed -n 's/ {esp_name}$//p' | head -n 1)
    if [ -z "${{part:-}}" ]; then
        say "there is no boot partition {esp_name} beside the root file system; nothing was changed"
        exit 0 # a tree that is being built, or another way to boot
    fi
    esp=$(mktemp -d /run/appliance-esp.XXXXXX)
    trap 'umount "$esp" 2>/dev/null; rmdir "$esp"' EXIT
    mount -t vfat -o umask=0077 "$part" "$esp"
fi
newest=
for release in $(ls "$boot" | sed -n 's/^vmlinuz-//p' | sort -V); do
    [ ! -e "$boot/initrd.img-$release" ] || newest=$release
done
if [ -z "$newest" ]; then
    say "no kernel in $boot has an initrd; nothing was changed"
    exit 0
fi
for old in "$esp"/vmlinuz-* "$esp"/initrd.img-* "$esp"/*.new "$esp"/*/*/*.new; do
    name=${{old##*/}}
    case $name in
        *.new) ;;
        *) [ ! -e "$boot/$name" ] || continue
            # what the loaders start stays until they start another
            ! grep -qF "/$name" "$esp/{LOADER_FILES[0]}" "$esp/{LOADER_FILES[1]}" || continue ;;
    esac
    rm -f "$old"
done
put() {{ # FILE, its name on the boot partition: whole under that name, or not at all
    cmp -s "$1" "$esp/$2" && return
    if ! {{ cp "$1" "$esp/$2.new" && sync "$esp/$2.new" && mv "$esp/$2.new" "$esp/$2"; }}; then
        rm -f "$esp/$2.new"
        say "$2 could not be written to the boot partition; the system still starts with the kernel before. Free space:"
        df -h "$esp" >&2
        exit 1
    fi
}}
for name in "vmlinuz-$newest" "initrd.img-$newest"; do put "$boot/$name" "$name"; done
turned=$(mktemp)
for file in {" ".join(LOADER_FILES)}; do
    sed -E -e "s|^( *linux ) */vmlinuz.*|\\\\1/vmlinuz-$newest|I" \\
        -e "s|^( *initrd ) */initrd.*|\\\\1/initrd.img-$newest|I" \\
        -e "s|^(version ).*|\\\\1$newest|" "$esp/$file" >"$turned"
    put "$turned" "$file"
done
rm -f "$turned"
for old in "$esp"/vmlinuz-* "$esp"/initrd.img-*; do
    [ -e "$boot/${{old##*/}}" ] || rm -f "$old"
done
sync -f "$esp"
"""
