"""pki.ssh_keys: one key, one spelling; lines that can't be broken out of; private key files."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.errors import TrustError, UsageError
from appliance.pki import ssh_keys

P = 2**255 - 19
RAW = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
LINE = ssh_keys.public_line(RAW)
WORD = LINE.split()[1]


def wire(kind: bytes, *parts: bytes) -> str:
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (kind, *parts))
    return base64.b64encode(blob).decode()


def test_a_line_and_its_key_are_each_others_inverse() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes_raw()
    line = ssh_keys.public_line(raw)
    assert ssh_keys.parse_public(line) == raw
    openssh = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert line.encode() == openssh


def test_a_generated_pair_belongs_together() -> None:
    private, line = ssh_keys.generate()
    assert ssh_keys.load_private(private.reveal()).public_key().public_bytes_raw() == ssh_keys.parse_public(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "type ''"),
        ("ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ==", "type 'ssh-rsa'"),
        (f"ssh-rsa {wire(b'ssh-rsa', b'x' * 3, b'y' * 256)}", "type 'ssh-rsa'"),
        (f"ecdsa-sha2-nistp256 {wire(b'ecdsa-sha2-nistp256', b'nistp256', b'4' * 65)}", "'ecdsa-sha2-nistp256'"),
        ("sk-ssh-ed25519@openssh.com AAAA", "type 'sk-ssh-ed25519@openssh.com'"),
        ("ssh-ed25519-cert-v01@openssh.com AAAA", "'ssh-ed25519-cert-v01@openssh.com'"),
        ("SSH-ED25519 " + WORD, "type 'SSH-ED25519'"),
        (" " + LINE, "type ''"),
        ("ssh-ed25519\t" + WORD, "of type"),
        ('command="x" ' + LINE, "of type"),
        ("ssh-ed25519", "no Ed25519 key"),
        (f"ssh-ed25519 {wire(b'ssh-rsa', b'x' * 3, b'y' * 256)}", "no Ed25519 key"),
        (f"ssh-ed25519 {wire(b'ssh-ed25519', b'x' * 31)}", "no Ed25519 key"),
        (f"ssh-ed25519 {wire(b'ssh-ed25519', b'x' * 33)}", "no Ed25519 key"),
        (f"ssh-ed25519 {wire(b'ssh-ed25519', b'x' * 32, b'more')}", "no Ed25519 key"),
        (LINE + " comment", "no base64"),
        (LINE + "\n", "no base64"),
        (LINE + "\nssh-ed25519 " + WORD, "no base64"),
        (LINE + " ", "no base64"),
        ("ssh-ed25519  " + WORD, "no base64"),
        (LINE + "=", "canonical|base64"),
        (LINE + "====", "canonical|base64"),
        (LINE + "ä", "no base64"),
        (LINE[:-1] + "-", "no base64"),
        (LINE[:-4], "no Ed25519 key"),
        (LINE[:40] + "\n" + LINE[40:], "no base64"),
        (LINE[:-1] + "\0", "no base64"),
    ],
)
def test_anything_but_one_canonical_ed25519_line_is_refused(line: str, says: str) -> None:
    with pytest.raises(TrustError, match=says):
        ssh_keys.parse_public(line)


def test_a_canonical_word_with_padding_is_refused_even_where_base64_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # 51 bytes are 68 characters without a spare bit, so strict base64 has no second spelling today; the comparison
    # stays because the standard library changed what `validate` lets through before.
    lax = base64.b64decode
    monkeypatch.setattr(base64, "b64decode", lambda text, validate: lax(text))
    with pytest.raises(TrustError, match="canonical"):
        ssh_keys.parse_public(LINE[:40] + "\n" + LINE[40:])


def order(y: int) -> int:
    """The order of a point on edwards25519 with this y, up to 8; 0 where there is none or it is larger."""
    d = -121665 * pow(121666, -1, P) % P
    square = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    if x * x % P != square:
        return 0
    point = (x, y)
    for times in (1, 2, 4, 8):
        if point == (0, 1):
            return times
        x, y = point
        k = d * x * x * y * y
        point = (2 * x * y * pow(1 + k, -1, P) % P, (y * y + x * x) * pow(1 - k, -1, P) % P)
    return 0


def test_the_listed_points_are_all_of_small_order() -> None:
    # Orders 1, 2, 4 (one y, two signs) and 8 (two y, two signs each): the eight points of the torsion group.
    assert sorted(order(y) for y in ssh_keys._SMALL_ORDER_Y) == [1, 2, 4, 8, 8]


@pytest.mark.parametrize("y", [*sorted(ssh_keys._SMALL_ORDER_Y), P, P + 1, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 2**255])
def test_points_that_prove_nothing_are_refused(y: int, sign: int) -> None:
    with pytest.raises(TrustError, match="proves nothing"):
        ssh_keys.parse_public(ssh_keys.public_line((y + sign).to_bytes(32, "little")))


@given(
    st.text(max_size=100) | st.text(alphabet="AIE3NzaC1lZDI5T+/=", min_size=60, max_size=70).map("ssh-ed25519 ".__add__)
)
@example(LINE)
def test_any_text_is_a_key_or_refused(line: str) -> None:
    try:
        raw = ssh_keys.parse_public(line)
    except TrustError:
        return
    assert ssh_keys.public_line(raw) == line


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_raw_key_has_32_bytes(length: int) -> None:
    with pytest.raises(TrustError, match=f"{length} bytes, 32 expected"):
        ssh_keys.public_line(bytes(length))


def test_an_authorized_keys_line_carries_all_restrictions() -> None:
    line = ssh_keys.authorized_keys_line(
        LINE, number=258, reverse_port=5097, permit_open=["channel:80", "[::1]:443"], comment="se web 1"
    )
    assert line == (
        'restrict,port-forwarding,permitlisten="127.1.1.2:5097",permitopen="channel:80",permitopen="[::1]:443",'
        f'command="/bin/false" {LINE} se web 1'
    )


@pytest.mark.parametrize(
    "change",
    [
        {"permit_open": []},
        {"permit_open": ["channel"]},
        {"permit_open": ["*:*"]},
        {"permit_open": ["*:80"]},
        {"permit_open": ['a:1",command="/bin/sh']},
        {"permit_open": ["a:1\n"]},
        {"permit_open": ["a b:1"]},
        {"comment": ""},
        {"comment": "a\nssh-ed25519 AAAA"},
        {"comment": " a"},
        {"comment": "a "},
        {"comment": "ä"},
        {"comment": "x" * 129},
        {"reverse_port": 0},
        {"reverse_port": 65_536},
        {"number": 0},
        {"number": 1 << 24},
    ],
)
def test_an_authorized_keys_line_is_not_broken_out_of(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"number": 1, "reverse_port": 5097, "permit_open": ["channel:80"], "comment": "se"}
    with pytest.raises(UsageError):
        ssh_keys.authorized_keys_line(LINE, **{**arguments, **change})  # type: ignore[arg-type]


def test_a_known_hosts_line() -> None:
    assert ssh_keys.known_hosts_line(["[127.1.0.1]:5097", "se-1"], LINE) == f"[127.1.0.1]:5097,se-1 {LINE}"
    assert ssh_keys.known_hosts_line(["::1", "[::1]:22"], LINE) == f"::1,[::1]:22 {LINE}"


@pytest.mark.parametrize(
    "hosts", [[], [""], ["a b"], ["a,b"], ["*"], ["!a"], ["|1|x|y"], ["a\n"], ["@revoked"], ["#a"]]
)
def test_a_known_hosts_line_is_not_broken_out_of(hosts: list[str]) -> None:
    with pytest.raises(UsageError):
        ssh_keys.known_hosts_line(hosts, LINE)


def test_no_line_is_made_of_another_key() -> None:
    makers: list[Callable[[], str]] = [
        lambda: ssh_keys.known_hosts_line(["a"], "ssh-rsa AAAA"),
        lambda: ssh_keys.fingerprint("ssh-rsa AAAA"),
        lambda: ssh_keys.authorized_keys_line(
            "ssh-rsa AAAA", number=1, reverse_port=1, permit_open=["a:1"], comment="c"
        ),
    ]
    for make in makers:
        with pytest.raises(TrustError, match="ssh-rsa"):
            make()


def test_private_keys_in_both_formats() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    for secret in (ssh_keys.to_openssh(key), ssh_keys.to_pkcs8(key)):
        assert repr(secret) == "<redacted>"
        assert ssh_keys.load_private(secret.reveal()).private_bytes_raw() == key.private_bytes_raw()


PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
OPENSSH = serialization.PrivateFormat.OpenSSH
OPEN = serialization.NoEncryption()


@pytest.mark.parametrize("kind", [PKCS8, OPENSSH])
def test_private_keys_of_another_kind(kind: serialization.PrivateFormat) -> None:
    keys = (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1()))
    for key in keys:
        with pytest.raises(TrustError, match="another kind, Ed25519 expected"):
            ssh_keys.load_private(key.private_bytes(PEM, kind, OPEN))


@pytest.mark.parametrize("kind", [PKCS8, OPENSSH])
def test_an_encrypted_private_key_is_refused_without_asking(kind: serialization.PrivateFormat) -> None:
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        PEM, kind, serialization.BestAvailableEncryption(b"passphrase")
    )
    with pytest.raises(TrustError, match="encrypted"):
        ssh_keys.load_private(pem)


def test_a_private_key_file_over_the_limit() -> None:
    with pytest.raises(TrustError, match="at most 16384"):
        ssh_keys.load_private(b"x" * 16_385)


PRIVATE = ssh_keys.to_openssh(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))).reveal()


@given(st.integers(0, len(PRIVATE) - 20), st.binary(max_size=3))
def test_a_damaged_private_key_file_is_refused_and_never_quoted(position: int, patch: bytes) -> None:
    with pytest.raises(TrustError, match="can't be read: damaged") as caught:
        ssh_keys.load_private(PRIVATE[:position] + patch)
    assert caught.value.__suppress_context__


KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PKCS8_DER = KEY.private_bytes(serialization.Encoding.DER, PKCS8, OPEN)


@given(st.integers(0, len(PKCS8_DER) - 33), st.integers(0, 255))
def test_a_private_key_with_a_changed_byte_is_the_key_or_refused(position: int, byte: int) -> None:
    """Position stays before the key's own bytes: changed there, it is just another key."""
    damaged = PKCS8_DER[:position] + bytes([byte]) + PKCS8_DER[position + 1 :]
    pem = b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(damaged) + b"\n-----END PRIVATE KEY-----\n"
    try:
        loaded = ssh_keys.load_private(pem)
    except TrustError:
        return
    assert loaded.private_bytes_raw() == KEY.private_bytes_raw()
