"""SSH keys as text: OpenSSH public key lines, fingerprints, authorized_keys and known_hosts lines, private key files.

Only `ssh-ed25519` exists here, and each key has exactly one spelling: `ssh-ed25519 <base64>`, one space, no comment,
canonical base64. Two spellings of one key would be two keys to the registry. Keys of small order or with a coordinate
outside the field are refused too: anybody can sign for the former, and the latter are second spellings.

What OpenSSH makes of these texts is checked by `tests/contract/test_openssh_keys.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.errors import TrustError, UsageError
from appliance.pki.secret import Secret
from appliance.protocol.address import se_address

KEY_TYPE: Final = "ssh-ed25519"
MAX_PRIVATE_BYTES: Final = 16 * 1024

_BLOB_PREFIX: Final = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"
"""RFC 8709 section 4: string "ssh-ed25519", string key; the key is 32 bytes long."""

_FIELD: Final = 2**255 - 19
_SMALL_ORDER_Y: Final = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        55188659117513257062467267217118295137698188065244968500265048394206261417927,
    }
)
"""y of the points of order 1, 2, 4 and 8 on edwards25519 (RFC 7748 section 4.1, cofactor 8)."""

_PERMIT: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")
_COMMENT: Final = re.compile(r"[!-~]([ -~]{0,126}[!-~])?")
_HOST: Final = re.compile(r"\[[A-Za-z0-9._:-]{1,253}\]:[0-9]{1,5}|[A-Za-z0-9._:-]{1,253}")


def generate() -> tuple[Secret, str]:
    """Makes a key pair. Returns the OpenSSH private key file's content and the public line."""
    key = Ed25519PrivateKey.generate()
    return to_openssh(key), public_line(key.public_key().public_bytes_raw())


def public_line(raw: bytes) -> str:
    """Returns the line `ssh-ed25519 <base64>` of a raw public key (32 bytes, RFC 8032)."""
    if len(raw) != 32:
        raise TrustError(f"Ed25519 public key of {len(raw)} bytes, 32 expected")
    return f"{KEY_TYPE} {base64.b64encode(_BLOB_PREFIX + raw).decode()}"


def parse_public(line: str) -> bytes:
    """Returns the raw 32 bytes of a public key line.

    Raises:
        TrustError: another key type, a comment, another spelling of the base64, or a point nobody owns.
    """
    kind, _, text = line.partition(" ")
    if kind != KEY_TYPE:
        raise TrustError(
            f"SSH key of type {kind[:40]!r}, {KEY_TYPE!r} expected", hint="make one with `ssh-keygen -t ed25519`"
        )
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise TrustError("the SSH key line's second word is no base64 (no comment may follow it)") from None
    raw = blob[len(_BLOB_PREFIX) :]
    if blob[: len(_BLOB_PREFIX)] != _BLOB_PREFIX or len(raw) != 32:
        raise TrustError("the SSH key line's base64 holds no Ed25519 key")
    if public_line(raw) != line:
        raise TrustError("the SSH key line is not in its one canonical form")
    y = int.from_bytes(raw, "little") % 2**255
    if y >= _FIELD or y in _SMALL_ORDER_Y:
        raise TrustError("the SSH key is a point that proves nothing (small order or outside the field)")
    return raw


def fingerprint(line: str) -> str:
    """Returns `SHA256:<base64 without padding>`, as `ssh-keygen -l` shows it."""
    digest = hashlib.sha256(_BLOB_PREFIX + parse_public(line)).digest()
    return "SHA256:" + base64.b64encode(digest).rstrip(b"=").decode()


def authorized_keys_line(line: str, *, number: int, reverse_port: int, permit_open: Sequence[str], comment: str) -> str:
    """Returns the authorized_keys line of SE `number`, with all its restrictions (sshd(8), AUTHORIZED_KEYS).

    `command=` is there because `restrict,port-forwarding` alone lets a session run (FACTS, trap 4). What can't be said
    in such a line belongs into sshd_config: `GatewayPorts clientspecified` (or the address is ignored),
    `AllowStreamLocalForwarding no` (or the SE may listen on unix sockets), `PermitTunnel no` (OpenSSH's default).
    `tests/contract/test_authorized_keys.py` shows that nothing else is needed.

    Args:
        line: the SE's public key.
        number: SE number; its loopback address follows from it.
        reverse_port: the only port it may ask to listen on, at its own address.
        permit_open: `host:port` of what it may open; at least one, since none would mean all to sshd.
        comment: printable ASCII.

    Raises:
        TrustError: `line` is no key.
        UsageError: something that can't stand in such a line.
    """
    parse_public(line)
    if not permit_open:
        raise UsageError("no permitopen given: OpenSSH would allow every destination")
    for destination in permit_open:
        if not _PERMIT.fullmatch(destination):
            raise UsageError(f"{destination!r} can't stand in permitopen", hint="write host:port")
    if not 1 <= reverse_port <= 65535:
        raise UsageError(f"reverse port {reverse_port} is outside 1..65535")
    if not _COMMENT.fullmatch(comment):
        raise UsageError(f"{comment!r} can't be a key's comment", hint="use 1 to 128 printable ASCII characters")
    options = [
        "restrict",
        "port-forwarding",
        f'permitlisten="{se_address(number)}:{reverse_port}"',
        *(f'permitopen="{destination}"' for destination in permit_open),
        'command="/bin/false"',
    ]
    return f"{','.join(options)} {line} {comment}"


def known_hosts_line(hosts: Sequence[str], line: str) -> str:
    """Returns a known_hosts line: `hosts` as OpenSSH writes them (`name`, or `[name]:port` off port 22)."""
    parse_public(line)
    if not hosts:
        raise UsageError("a known_hosts line needs a host")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise UsageError(f"{host!r} can't stand in known_hosts", hint="write name or [name]:port")
    return f"{','.join(hosts)} {line}"


def load_private(pem: bytes) -> Ed25519PrivateKey:
    """Loads an unencrypted Ed25519 private key, OpenSSH or PKCS #8 PEM.

    Raises:
        TrustError: damaged, encrypted, or of another kind. The message never quotes the content.
    """
    if len(pem) > MAX_PRIVATE_BYTES:
        raise TrustError(f"private key file of {len(pem)} bytes, at most {MAX_PRIVATE_BYTES} are accepted")
    load = serialization.load_pem_private_key
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in pem:
        load = serialization.load_ssh_private_key
    try:
        key = load(pem, password=None)
    except Exception:  # noqa: BLE001 - a damaged file raises ValueError, TypeError, UnsupportedAlgorithm or InternalError
        raise TrustError(
            "the private key can't be read: damaged, encrypted, or no OpenSSH or PKCS #8 file",
            hint="restore it from a backup, or make a new one",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError("the private key is of another kind, Ed25519 expected")
    return key


def to_openssh(key: Ed25519PrivateKey) -> Secret:
    """Returns the content of an OpenSSH private key file, unencrypted: it is to be written 0600."""
    return Secret(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )


def to_pkcs8(key: Ed25519PrivateKey) -> Secret:
    """Returns the content of a PKCS #8 PEM file, unencrypted: it is to be written 0600."""
    return Secret(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
