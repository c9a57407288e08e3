"""Seals a file under a passphrase: what a backup of the controller's keys lies in, and its root key where one is set.

    magic line, header line (JSON: what it is, and the parameters below), then one ChaCha20-Poly1305 box (RFC 8439)

The key comes from the passphrase by scrypt (RFC 7914) with a salt of its own, so the nonce may stand still. Magic and
header are authenticated with the box: a changed byte anywhere is found, and can't be told from a wrong passphrase.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from appliance.errors import TrustError, UsageError
from appliance.pki.secret import Secret
from appliance.protocol import strict_json
from appliance.protocol.strict_json import MalformedError

ROOT_KEY: Final = b"appliance root key"
BACKUP: Final = b"appliance controller backup"
"""Magic lines of the two kinds there are."""
MIN_PASSPHRASE_CHARS: Final = 12
MAX_HEADER_BYTES: Final = 4 * 1024
MAX_PLAIN_BYTES: Final = (1 << 31) - 1 - 16
"""What one box takes (cryptography's limit)."""
SCRYPT_LOG2_N: Final = 17
"""128 MiB and about half a second a guess."""
_SCRYPT_R: Final = 8
_SALT_BYTES: Final = 16
_KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    about: dict[str, Any]
    scrypt_log2_n: int
    salt: str


def check_passphrase(passphrase: Secret) -> None:
    """Raises `UsageError` for a passphrase that protects nothing."""
    if len(passphrase.reveal().decode(errors="replace")) < MIN_PASSPHRASE_CHARS:
        raise UsageError(
            f"the passphrase is shorter than {MIN_PASSPHRASE_CHARS} characters",
            hint="who gets the file can try passphrases at leisure: use five random words or more",
        )


def _key(passphrase: Secret, header: _Header) -> bytes:
    salt = base64.b64decode(header.salt, validate=True)
    kdf = Scrypt(salt=salt, length=_KEY_BYTES, n=1 << header.scrypt_log2_n, r=_SCRYPT_R, p=1)
    return kdf.derive(passphrase.reveal())


def seal(plain: bytes, passphrase: Secret, *, magic: bytes, about: dict[str, Any]) -> bytes:
    """Returns the sealed file.

    Args:
        plain: at most `MAX_PLAIN_BYTES`.
        passphrase: at least `MIN_PASSPHRASE_CHARS`.
        magic: first line without its end; says what kind of file it is.
        about: readable by all, for whoever finds the file.

    Raises:
        UsageError: a passphrase that protects nothing, or too much to seal.
    """
    check_passphrase(passphrase)
    if len(plain) > MAX_PLAIN_BYTES:
        raise UsageError(f"{len(plain)} bytes can't be sealed, at most {MAX_PLAIN_BYTES}")
    salt = base64.b64encode(secrets.token_bytes(_SALT_BYTES)).decode()
    header = _Header(about=about, scrypt_log2_n=SCRYPT_LOG2_N, salt=salt)
    head = magic + b"\n" + strict_json.encode(header) + b"\n"
    return head + ChaCha20Poly1305(_key(passphrase, header)).encrypt(_NONCE, plain, head)


def open_sealed(sealed: bytes, passphrase: Secret, *, magic: bytes) -> bytes:
    """Returns what was sealed.

    Raises:
        TrustError: another kind of file, damaged, or the wrong passphrase.
    """
    header, head = _read_header(sealed, magic)
    try:
        return ChaCha20Poly1305(_key(passphrase, header)).decrypt(_NONCE, sealed[len(head) :], head)
    except InvalidTag:
        raise TrustError(
            "it can't be opened: the passphrase is wrong, or the file was changed or cut off",
            hint="try the passphrase again; compare the file's SHA-256 with another copy's",
        ) from None


def about(sealed: bytes, *, magic: bytes) -> dict[str, Any]:
    """Returns what a file says of itself to everybody; only `open_sealed` knows whether that is true.

    Raises:
        TrustError: another kind of file, or a damaged header.
    """
    header, _ = _read_header(sealed, magic)
    return header.about


def _read_header(sealed: bytes, magic: bytes) -> tuple[_Header, bytes]:
    first, end, rest = sealed[: len(magic) + 1 + MAX_HEADER_BYTES].partition(b"\n")
    if first != magic or not end:
        raise TrustError(f"this is no file of the kind {magic.decode()!r}", hint="give the file that was made")
    line, end, _ = rest.partition(b"\n")
    try:
        header = strict_json.decode(line, _Header, max_bytes=MAX_HEADER_BYTES)
        salt = base64.b64decode(header.salt, validate=True)
    except (MalformedError, ValueError):
        raise _damaged() from None
    # The cost is the file's word until the box is opened: a changed one must not ask for all memory.
    if not end or header.scrypt_log2_n != SCRYPT_LOG2_N or len(salt) != _SALT_BYTES:
        raise _damaged()
    return header, first + b"\n" + line + b"\n"


def _damaged() -> TrustError:
    return TrustError("the file's header is damaged, or of a newer version", hint="use another copy, or upgrade")


def digest(sealed: bytes) -> str:
    """Returns the SHA-256 of a sealed file, hex: what `sha256sum` says of it."""
    return hashlib.sha256(sealed).hexdigest()
