"""Looks through the raw content of disks and files, whatever file system is on them.

Finds private keys in PEM (a key is one by its header and its base64, so that programs which merely know the word pass)
and what a controller seals under a passphrase (`pki.sealed`), certificates that name a cluster of ours, and the version
of the GNU C library. What is compressed or encrypted on the disk isn't found, and nothing is said about it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from appliance.pki import certificate, sealed

_CHUNK = 32 * 1024 * 1024
_OVERLAP = 64 * 1024
_MARK = b"PRIVATE KEY-----"
_KEY = re.compile(
    rb"-----BEGIN (?P<kind>[A-Z0-9 ]{0,24})PRIVATE KEY-----(?:\r?\n|\\n)"
    rb"(?:[A-Za-z-]{1,30}: [^\r\n]{1,100}\r?\n){0,4}\s?[A-Za-z0-9+/=]{16}[A-Za-z0-9+/=\r\n\\]{0,49152}"
    rb"(?:-----END [A-Z0-9 ]{0,24}PRIVATE KEY-----)?"
)
_SEALED = {sealed.ROOT_KEY: "sealed root key", sealed.BACKUP: "sealed backup of a controller"}
_SEALED_HEADER = rb"\n\{[^\n]{1,%d}\}\n" % sealed.MAX_HEADER_BYTES
_CERTIFICATE_MARK = b"-----BEGIN CERTIFICATE-----"
_CERTIFICATE = re.compile(
    _CERTIFICATE_MARK + rb"(?:\r?\n|\\n)([A-Za-z0-9+/=\r\n\\]{64,16384})-----END CERTIFICATE-----"
)
_LIBC_MARK = b"GNU C Library ("
_LIBC = re.compile(rb"GNU C Library \([^)\0]{1,80}\) (?:stable|development) release version (\d+)\.(\d+)")


class FoundKey(msgspec.Struct, frozen=True, kw_only=True):
    """A PEM block that holds a private key, or the head of a sealed file that holds some."""

    offset: int
    """Bytes from the beginning of what was looked through."""
    kind: str
    """What stands before PRIVATE KEY, such as `EC` or `OPENSSH`; empty for PKCS #8. Of a sealed file: what it is."""
    pem: bytes
    """Real line ends, also where it stood in JSON; of a sealed file its first two lines. Never to be shown."""

    @property
    def is_sealed(self) -> bool:
        """Whether it is a file that a controller sealed."""
        return self.kind in _SEALED.values()


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, in order of place."""

    keys: list[FoundKey]
    glibc: list[tuple[int, int]]
    certificates: list[bytes] = []
    """DER, those with a name of our own clusters, each once."""


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
    """Returns keys, certificates and C libraries anywhere in a file."""
    keys: dict[int, FoundKey] = {}
    glibc: list[tuple[int, int]] = []
    certificates: dict[bytes, None] = {}
    for offset, content in chunks(path):
        for key in _keys(offset, content):
            keys[key.offset] = key
        certificates |= dict.fromkeys(_certificates(content))
        for at in _places(content, _LIBC_MARK):
            found = _LIBC.match(content, at)
            if found is not None:
                glibc.append((int(found[1]), int(found[2])))
    return Findings(keys=[keys[offset] for offset in sorted(keys)], glibc=glibc, certificates=list(certificates))


def _places(content: bytes, mark: bytes) -> Iterator[int]:
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + len(mark))


def _keys(offset: int, content: bytes) -> Iterator[FoundKey]:
    for at in _places(content, _MARK):
        match = _KEY.match(content, max(content.rfind(b"-----BEGIN ", max(at - 40, 0), at), 0))
        if match is not None:
            pem = match[0].replace(b"\\n", b"\n")
            yield FoundKey(offset=offset + match.start(), kind=match["kind"].decode().strip(), pem=pem)
    for magic, kind in _SEALED.items():
        for at in _places(content, magic):
            match = re.compile(magic + _SEALED_HEADER).match(content, at)
            if match is not None:
                yield FoundKey(offset=offset + at, kind=kind, pem=match[0])


def _certificates(content: bytes) -> Iterator[bytes]:
    for at in _places(content, _CERTIFICATE_MARK):
        match = _CERTIFICATE.match(content, at)
        if match is None:
            continue
        try:
            der = base64.b64decode(b"".join(match[1].replace(b"\\n", b"").split()), validate=True)
        except (binascii.Error, ValueError):
            continue
        if certificate.URI_SCHEME.encode() in der:
            yield der
