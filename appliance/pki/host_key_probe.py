"""Asks an SSH server to prove its host key, and no more: the first key exchange of a connection, then the end.

Takes bytes and returns bytes; the caller carries them. No log-in, no encryption, no channel: nothing secret is ever
said, so the cheapest key exchange that both know is taken. A whole SSH client costs ten times as much, and a controller
asks each of its SEs after each storm.

    us      version, KEXINIT
    them    version (other lines may come before it), KEXINIT
    us      KEX_ECDH_INIT
    them    KEX_ECDH_REPLY: host key, and its signature over all of the above

Rules: RFC 4253 sections 4.2, 6, 7 and 8; RFC 5656 section 4; RFC 8731 (curve25519-sha256); draft-ietf-sshm-mlkem-hybrid
(mlkem768x25519-sha256). The signature is verified before the key is believed. A server may say no more than
`MAX_BYTES` before it has proved its key.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from appliance.errors import TrustError
from appliance.pki import ssh_keys

VERSION: Final = b"SSH-2.0-appliance"
MAX_BYTES: Final = 64 * 1024
MAX_PACKET_BYTES: Final = 35000
"""RFC 4253 section 6.1."""
MAX_LINE_BYTES: Final = 255

_CURVES: Final = (b"curve25519-sha256", b"curve25519-sha256@libssh.org")
_HYBRID: Final = b"mlkem768x25519-sha256"
KEX: Final = (*_CURVES, _HYBRID)
_MLKEM_CIPHERTEXT_BYTES: Final = 1088
_HOST_KEY: Final = ssh_keys.KEY_TYPE.encode("ascii")
# Never used: the connection ends before anything is encrypted. What every server of the last ten years has.
_REST: Final = (b"aes128-gcm@openssh.com,aes128-ctr", b"hmac-sha2-256", b"none")

_DISCONNECT, _IGNORE, _DEBUG, _KEXINIT, _ECDH_INIT, _ECDH_REPLY = 1, 2, 4, 20, 30, 31


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _mpint(value: bytes) -> bytes:
    """A positive number, given big-endian (RFC 4251 section 5)."""
    digits = value.lstrip(b"\0")
    return _string(b"\0" + digits if digits[:1] >= b"\x80" else digits)


class _Reader:
    """Reads the fields of one payload; raises `TrustError` where it ends too early."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    def take(self, size: int) -> bytes:
        taken = self._payload[self._at : self._at + size]
        if len(taken) < size:
            raise TrustError("a message of its key exchange ends too early")
        self._at += size
        return taken

    def string(self) -> bytes:
        return self.take(int.from_bytes(self.take(4), "big"))


class HostKeyProbe:
    """One probe. Send `hello` first, then give what comes to `feed` and send what it returns, until `host_key` is set.

    Attributes:
        hello: what to send at once.
        host_key: the server's proven public key line, None until then.
    """

    def __init__(self) -> None:
        lists = [b",".join(KEX), _HOST_KEY, *(entry for part in _REST for entry in (part, part)), b"", b""]
        self._our_init = bytes([_KEXINIT]) + secrets.token_bytes(16) + b"".join(map(_string, lists)) + b"\0" * 5
        self.hello = VERSION + b"\r\n" + _packet(self._our_init)
        self.host_key: str | None = None
        self._buffer = bytearray()
        self._fed_bytes = 0
        self._version = b""
        self._their_init = b""
        self._curve = X25519PrivateKey.generate()
        self._pq: MLKEM768PrivateKey | None = None
        self._public = b""

    def feed(self, received: bytes) -> bytes:
        """Takes what the server said; returns what to say next, b"" where nothing is due.

        Raises:
            TrustError: it is no SSH server, knows none of our algorithms, or doesn't prove its key.
        """
        self._fed_bytes += len(received)
        if self._fed_bytes > MAX_BYTES:
            raise TrustError(f"more than {MAX_BYTES >> 10} KiB before its key was proved")
        self._buffer += received
        said = b""
        while self.host_key is None:
            if not self._version:
                if not self._read_line():
                    break
            elif (payload := self._next_payload()) is None:
                break
            else:
                said += self._answer(payload)
        return said

    def _read_line(self) -> bool:
        """Takes one line off, the server's version or one before it; False where none is complete."""
        line, end, rest = self._buffer.partition(b"\n")
        if len(line) > MAX_LINE_BYTES:
            raise TrustError("it does not answer like an SSH server")
        if not end:
            return False
        self._buffer = rest
        if line.startswith(b"SSH-"):
            if not line.startswith((b"SSH-2.0-", b"SSH-1.99-")):
                raise TrustError("it speaks an SSH version before 2.0")
            self._version = bytes(line.rstrip(b"\r"))
        return True

    def _next_payload(self) -> bytes | None:
        """Takes one packet off; None where none is complete."""
        if len(self._buffer) < 5:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        padding = self._buffer[4]
        if not padding + 1 < size <= MAX_PACKET_BYTES:
            raise TrustError(f"a packet of {size} bytes, {padding} of them padding")
        if len(self._buffer) < 4 + size:
            return None
        payload = bytes(self._buffer[5 : 4 + size - padding])
        del self._buffer[: 4 + size]
        return payload

    def _answer(self, payload: bytes) -> bytes:
        kind = payload[0]
        if _IGNORE <= kind <= _DEBUG:
            return b""
        if kind == _KEXINIT and not self._their_init:
            return self._choose(payload)
        if kind == _ECDH_REPLY and self._their_init:
            self._prove(_Reader(payload[1:]))
            return b""
        if kind == _DISCONNECT:
            raise TrustError("it hung up during the key exchange")
        raise TrustError(f"message {kind} during the key exchange")

    def _choose(self, payload: bytes) -> bytes:
        fields = _Reader(payload[17:])
        theirs, host_keys = fields.string().split(b","), fields.string().split(b",")
        chosen = next((name for name in KEX if name in theirs), None)
        if chosen is None:
            raise TrustError(f"no key exchange in common, one of {', '.join(name.decode() for name in KEX)} expected")
        if _HOST_KEY not in host_keys:
            raise TrustError(f"it has no host key of the type {ssh_keys.KEY_TYPE}")
        self._their_init = payload
        self._public = self._curve.public_key().public_bytes_raw()
        if chosen == _HYBRID:
            self._pq = MLKEM768PrivateKey.generate()
            self._public = self._pq.public_key().public_bytes_raw() + self._public
        return _packet(bytes([_ECDH_INIT]) + _string(self._public))

    def _shared(self, theirs: bytes) -> bytes:
        """The shared secret as it enters the exchange hash. Raises `ValueError` where theirs can't be right."""
        if self._pq is None:
            return _mpint(self._curve.exchange(X25519PublicKey.from_public_bytes(theirs)))
        ciphertext, point = theirs[:_MLKEM_CIPHERTEXT_BYTES], theirs[_MLKEM_CIPHERTEXT_BYTES:]
        secret = self._pq.decapsulate(ciphertext) + self._curve.exchange(X25519PublicKey.from_public_bytes(point))
        return _string(hashlib.sha256(secret).digest())

    def _prove(self, reply: _Reader) -> None:
        blob, theirs, signature = reply.string(), reply.string(), reply.string()
        try:
            shared = self._shared(theirs)
        except ValueError:
            raise TrustError("its half of the key exchange is no key") from None
        key, signed = _Reader(blob), _Reader(signature)
        if key.string() != _HOST_KEY or signed.string() != _HOST_KEY:
            raise TrustError(f"it shows a host key that is not of the type {ssh_keys.KEY_TYPE}")
        line = ssh_keys.public_line(key.string())
        said = (VERSION, self._version, self._our_init, self._their_init, blob, self._public, theirs)
        digest = hashlib.sha256(b"".join(map(_string, said)) + shared).digest()
        try:
            Ed25519PublicKey.from_public_bytes(ssh_keys.parse_public(line)).verify(signed.string(), digest)
        except InvalidSignature:
            raise TrustError("it shows a host key that it does not have") from None
        self.host_key = line


def _packet(payload: bytes) -> bytes:
    """An unencrypted packet (RFC 4253 section 6)."""
    padding = 8 - (5 + len(payload)) % 8
    padding += 8 if padding < 4 else 0
    return (1 + len(payload) + padding).to_bytes(4, "big") + bytes([padding]) + payload + b"\0" * padding
