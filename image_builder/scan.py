"""Looks through the raw content of disks and files, whatever file system is on them.

Finds PEM private keys (a key is one by its header and its base64, so that programs which merely know the word pass) and
the version of the GNU C library. What is compressed or encrypted on the disk isn't found, and nothing is said about it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

_CHUNK = 32 * 1024 * 1024
_OVERLAP = 64 * 1024
_MARK = b"PRIVATE KEY-----"
_KEY = re.compile(
    rb"-----BEGIN (?P<kind>[A-Z0-9 ]{0,24})PRIVATE KEY-----(?:\r?\n|\\n)"
    rb"(?:[A-Za-z-]{1,30}: [^\r\n]{1,100}\r?\n){0,4}\s?[A-Za-z0-9+/=]{16}[A-Za-z0-9+/=\r\n\\]{0,49152}"
    rb"(?:-----END [A-Z0-9 ]{0,24}PRIVATE KEY-----)?"
)
_LIBC_MARK = b"GNU C Library ("
_LIBC = re.compile(rb"GNU C Library \([^)\0]{1,80}\) (?:stable|development) release version (\d+)\.(\d+)")


class FoundKey(msgspec.Struct, frozen=True, kw_only=True):
    """A PEM block that holds a private key."""

    offset: int
    """Bytes from the beginning of what was looked through."""
    kind: str
    """What stands before PRIVATE KEY, such as `EC` or `OPENSSH`; empty for PKCS #8."""
    pem: bytes
    """Real line ends, also where it stood in JSON. Never to be shown."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, in order of place."""

    keys: list[FoundKey]
    glibc: list[tuple[int, int]]


def sha256(content: bytes) -> str:
    """Returns the SHA-256, hex."""
    return hashlib.sha256(content).hexdigest()


def chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields a file's content without its holes: offset and bytes, neighbours overlapping by 64 KiB."""
    with path.open("rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole follows
                return
            until = os.lseek(stream.fileno(), at, os.SEEK_HOLE)
            while at < until:
                content = os.pread(stream.fileno(), min(until - at, _CHUNK), at)
                yield at, content
                at += len(content)
                if at < until:
                    at -= min(_OVERLAP, len(content) - 1)


def look_through(path: Path) -> Findings:
    """Returns keys and C libraries anywhere in a file."""
    keys: dict[int, FoundKey] = {}
    glibc: list[tuple[int, int]] = []
    for offset, content in chunks(path):
        at = content.find(_MARK)
        while at >= 0:
            match = _KEY.match(content, max(content.rfind(b"-----BEGIN ", max(at - 40, 0), at), 0))
            if match is not None:
                pem = match[0].replace(b"\\n", b"\n")
                kind = match["kind"].decode().strip()
                keys[offset + match.start()] = FoundKey(offset=offset + match.start(), kind=kind, pem=pem)
            at = content.find(_MARK, at + len(_MARK))
        at = content.find(_LIBC_MARK)
        while at >= 0:
            found = _LIBC.match(content, at)
            if found is not None:
                glibc.append((int(found[1]), int(found[2])))
            at = content.find(_LIBC_MARK, at + 1)
    return Findings(keys=[keys[offset] for offset in sorted(keys)], glibc=glibc)
