"""pki.tls: real handshakes on loopback, and the verdict on the peer's certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from forgery import CLIENT_AUTH, DAY_S, NOW, Forged, forge, root_of

from appliance.errors import StorageError, TrustError
from appliance.pki import certificate, tls
from appliance.pki.authority import Authority, Issuer, certificate_terms
from appliance.protocol.trust import MAX_ROOT_CHANGES

TIMEOUT_S = 10.0

OURS = Authority.create("c-1", now=NOW)
ROOT = OURS.certificate_pem.decode()


def files(directory: Path, certificate_pem: bytes, key_pem: bytes) -> tuple[Path, Path]:
    certificate_path, key_path = directory / "node.pem", directory / "node.key"
    certificate_path.write_bytes(certificate_pem)
    key_path.write_bytes(key_pem)
    return certificate_path, key_path


def issued(directory: Path, authority: Authority = OURS, *, now: int = NOW) -> ssl.SSLContext:
    node = authority.issue_node(node=1, addresses=["127.0.0.1"], now=now)
    return tls.server_context(*files(directory, node.certificate_pem, node.key.reveal()))


def forged(directory: Path, leaf: Forged, *intermediates: Forged, more: bytes = b"") -> ssl.SSLContext:
    chain = b"".join(entry.pem for entry in (leaf, *intermediates)) + more
    return tls.server_context(*files(directory, chain, leaf.key_pem))


@contextlib.contextmanager
def shaken(server: ssl.SSLContext, client: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """One TLS connection over loopback TCP; what the client's handshake raises comes out here."""

    def serve() -> None:
        connection, _ = listener.accept()
        connection.settimeout(TIMEOUT_S)
        with connection, contextlib.suppress(OSError), server.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=TIMEOUT_S) as raw,
                client.wrap_socket(raw) as secured,
            ):
                yield secured
        finally:
            thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def chain_of(server: ssl.SSLContext, *roots: str) -> list[bytes]:
    with shaken(server, tls.client_context(roots or (ROOT,))) as secured:
        return tls.peer_chain(secured)


def refusal(server: ssl.SSLContext, *roots: str) -> TrustError:
    with pytest.raises(ssl.SSLCertVerificationError) as caught, shaken(server, tls.client_context(roots or (ROOT,))):
        pass
    return tls.explain(caught.value)


def der(pem: bytes | str) -> bytes:
    raw = pem.encode() if isinstance(pem, str) else pem
    return x509.load_pem_x509_certificate(raw).public_bytes(serialization.Encoding.DER)


def check(*chain: bytes, revoked: tuple[str, ...] = ()) -> int | None:
    return tls.check_peer(chain, cluster_id="c-1", revoked_node_keys=revoked).node


def by_issuing(directory: Path, authority: Authority = OURS, *, now: int = NOW, more: bytes = b"") -> ssl.SSLContext:
    """A node whose certificate an issuing CA signed, as a controller with a locked root shows it."""
    made = authority.issue_issuing(now=now)
    node = Issuer.load(made.certificate_pem, made.key.reveal()).issue_node(node=1, addresses=[], now=now)
    return tls.server_context(*files(directory, node.certificate_pem + made.certificate_pem + more, node.key.reveal()))


# ----------------------------------------------------------------------------------------------- handshake


def test_a_node_of_the_cluster_is_believed(tmp_path: Path) -> None:
    with shaken(issued(tmp_path), tls.client_context([ROOT])) as secured:
        assert secured.version() == "TLSv1.3"
        assert secured.selected_alpn_protocol() == "http/1.1"
        chain = tls.peer_chain(secured)
    assert chain == [der((tmp_path / "node.pem").read_bytes()), der(ROOT)]
    assert check(*chain) == 1
    tls.check_validity(chain, now=NOW)


def test_any_of_several_roots_will_do(tmp_path: Path) -> None:
    other = Authority.create("c-1", now=NOW).certificate_pem.decode()
    assert chain_of(issued(tmp_path), other, ROOT)[-1] == der(ROOT)


def test_a_node_of_another_root_is_refused(tmp_path: Path) -> None:
    for stranger in (Authority.create("c-2", now=NOW), Authority.create("c-1", now=NOW)):
        error = refusal(issued(tmp_path, stranger))
        assert error.code == tls.CODE_WRONG_ROOT
        assert "isn't signed by a root CA this SE trusts" in error.message


def test_a_self_signed_node_is_refused(tmp_path: Path) -> None:
    assert refusal(forged(tmp_path, forge(None))).code == tls.CODE_WRONG_ROOT
    # Nor does it help to send the strange root along.
    strange = forge(None, ca=True, path_length=1)
    assert refusal(forged(tmp_path, forge(strange), strange)).code == tls.CODE_WRONG_ROOT


def test_a_root_that_carries_our_name_but_not_our_key_is_refused(tmp_path: Path) -> None:
    twin = forge(None, name="appliance c-1", uris=("appliance://c-1",), ca=True, path_length=1)
    assert refusal(forged(tmp_path, forge(twin), twin)).code == tls.CODE_WRONG_ROOT


def test_our_root_but_another_cluster_is_refused(tmp_path: Path) -> None:
    leaf = forge(root_of(OURS), uris=("appliance://c-2/node/1",))
    chain = chain_of(forged(tmp_path, leaf))
    with pytest.raises(TrustError, match="names cluster 'c-2', expected 'c-1'") as caught:
        check(*chain)
    assert caught.value.code == tls.CODE_CLUSTER


def test_a_revoked_node_key_is_refused_and_its_successor_is_not(tmp_path: Path) -> None:
    chain = chain_of(issued(tmp_path))
    revoked = certificate_terms((tmp_path / "node.pem").read_bytes()).key_id
    with pytest.raises(TrustError, match="key of node 1 was revoked") as caught:
        check(*chain, revoked=("0" * 64, revoked))
    assert caught.value.code == tls.CODE_REVOKED
    assert check(*chain_of(issued(tmp_path)), revoked=(revoked,)) == 1


def test_a_certificate_for_clients_is_refused_by_the_handshake(tmp_path: Path) -> None:
    leaf = forge(root_of(OURS), usages=CLIENT_AUTH)
    error = refusal(forged(tmp_path, leaf))
    assert error.code == tls.CODE_PURPOSE
    assert "not meant for TLS servers" in error.message
    with pytest.raises(TrustError, match="no serverAuth"):
        check(leaf.der)


def test_a_certificate_without_usage_passes_the_handshake_and_is_refused_after(tmp_path: Path) -> None:
    """OpenSSL takes no extended key usage for every usage; we don't."""
    chain = chain_of(forged(tmp_path, forge(root_of(OURS), usages=None)))
    with pytest.raises(TrustError, match="no serverAuth usage") as caught:
        check(*chain)
    assert caught.value.code == tls.CODE_PURPOSE


@pytest.mark.parametrize("uris", [("appliance://c-1",), ("appliance://c-1/node/0",), ("https://c-1/node/1",), ()])
def test_a_certificate_that_names_no_node_is_refused(uris: tuple[str, ...]) -> None:
    with pytest.raises(TrustError, match=r"is not a node's|names cluster ''"):
        check(forge(root_of(OURS), uris=uris).der)


def test_a_ca_certificate_is_no_node() -> None:
    with pytest.raises(TrustError, match=r"is not a node's"):
        check(forge(root_of(OURS), ca=True).der)
    with pytest.raises(TrustError, match=r"is not a node's"):
        check(der(ROOT))


def test_garbage_is_no_peer() -> None:
    with pytest.raises(TrustError, match="can't be read"):
        check(b"garbage")


OF_CLUSTER = ("appliance://c-1",)


def test_one_issuing_ca_below_the_root_is_accepted(tmp_path: Path) -> None:
    chain = chain_of(by_issuing(tmp_path))
    assert len(chain) == 3
    assert chain[-1] == der(ROOT)
    assert check(*chain) == 1
    tls.check_validity(chain, now=NOW)
    # The leaf's rules are for the leaf alone.
    assert not certificate.terms_of(certificate.load_der(chain[1])).serves_tls


def test_who_knows_only_the_former_root_believes_the_next_ones_issuing_ca(tmp_path: Path) -> None:
    """leaf, issuing CA, the next root's key certified by the former: a self-issued one that no path length counts."""
    successor = Authority.create("c-1", now=NOW)
    server = by_issuing(tmp_path, successor, more=OURS.cross_sign(successor, now=NOW))
    chain = chain_of(server)
    assert len(chain) == 4
    assert check(*chain) == 1
    assert len(chain_of(server, successor.certificate_pem.decode())) == 3


def generations(count: int) -> tuple[list[Authority], list[bytes]]:
    """Roots, each certified by the one before it, and those certificates with the newest first, as a node sends them.

    The first is OURS; there are `count` changes."""
    roots, crossed = [OURS], []
    for _ in range(count):
        roots.append(Authority.create("c-1", now=NOW))
        crossed.insert(0, roots[-2].cross_sign(roots[-1], now=NOW))
    return roots, crossed


@pytest.mark.parametrize("is_locked", [True, False])
def test_who_knows_only_the_first_of_four_roots_believes_the_last_one(tmp_path: Path, is_locked: bool) -> None:
    roots, crossed = generations(3)
    if is_locked:
        server = by_issuing(tmp_path, roots[-1], more=b"".join(crossed))
    else:
        node = roots[-1].issue_node(node=1, addresses=[], now=NOW)
        server = tls.server_context(*files(tmp_path, node.certificate_pem + b"".join(crossed), node.key.reveal()))
    for root, missed in zip(roots, (3, 2, 1, 0), strict=True):
        chain = chain_of(server, root.certificate_pem.decode())
        assert len(chain) == missed + (3 if is_locked else 2)
        assert check(*chain) == 1
        assert tls.is_of_later_root(chain) is (missed > 0)
        tls.check_validity(chain, now=NOW)


def test_later_roots_without_the_link_between_them_are_strangers(tmp_path: Path) -> None:
    roots, crossed = generations(2)
    assert refusal(by_issuing(tmp_path, roots[-1], more=crossed[0])).code == tls.CODE_WRONG_ROOT
    assert refusal(by_issuing(tmp_path, roots[-1], more=crossed[1])).code == tls.CODE_WRONG_ROOT


def test_an_issuing_ca_is_no_link_between_roots(tmp_path: Path) -> None:
    """Below a former root an issuing CA may not certify one of the roots' own name, nor may a later root's."""
    roots, crossed = generations(1)
    for issuer, more in ((OURS, b""), (roots[-1], crossed[0])):
        issuing = forge(root_of(issuer), name="issuing", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
        twin = forge(issuing, name="issuing", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
        chain = chain_of(forged(tmp_path, forge(twin), twin, issuing, more=more))
        with pytest.raises(TrustError, match="at most one issuing CA") as caught:
            check(*chain)
        assert caught.value.code == tls.CODE_WRONG_ROOT
        # One with a root's name is a CA of path length 0's own successor: OpenSSL counts it.
        posing = forge(issuing, name="appliance c-1", uris=OF_CLUSTER, usages=None, ca=True, path_length=1)
        assert refusal(forged(tmp_path, forge(posing), posing, issuing, more=more)).code == tls.CODE_WRONG_ROOT


def test_more_changes_of_root_than_are_followed_are_refused(tmp_path: Path) -> None:
    roots, crossed = generations(MAX_ROOT_CHANGES + 1)
    node = roots[-1].issue_node(node=1, addresses=[], now=NOW)
    server = tls.server_context(*files(tmp_path, node.certificate_pem + b"".join(crossed), node.key.reveal()))
    with pytest.raises(TrustError, match=f"at most {MAX_ROOT_CHANGES} are followed") as caught:
        check(*chain_of(server))
    assert "--seed PATH" in caught.value.hint
    assert check(*chain_of(server, roots[1].certificate_pem.decode())) == 1


def test_two_intermediates_are_refused(tmp_path: Path) -> None:
    first = forge(root_of(OURS), name="first", uris=OF_CLUSTER, usages=None, ca=True)
    second = forge(first, name="second", uris=OF_CLUSTER, usages=None, ca=True)
    error = refusal(forged(tmp_path, forge(second), second, first))
    assert error.code == tls.CODE_WRONG_ROOT
    assert "at most one intermediate" in error.message


def test_an_issuing_ca_that_certifies_another_is_refused(tmp_path: Path) -> None:
    """With a name of its own OpenSSL counts it; under the issuing CA's own name only we do (RFC 5280, 4.2.1.9)."""
    issuing = forge(root_of(OURS), name="issuing", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
    other = forge(issuing, name="other", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
    assert refusal(forged(tmp_path, forge(other), other, issuing)).code == tls.CODE_WRONG_ROOT
    twin = forge(issuing, name="issuing", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
    chain = chain_of(forged(tmp_path, forge(twin), twin, issuing))
    assert len(chain) == 4
    with pytest.raises(TrustError, match="at most one issuing CA") as caught:
        check(*chain)
    assert caught.value.code == tls.CODE_WRONG_ROOT


@pytest.mark.parametrize("path_length", [None, 1])
def test_an_intermediate_that_could_certify_others_is_refused(tmp_path: Path, path_length: int | None) -> None:
    broad = forge(root_of(OURS), name="broad", uris=OF_CLUSTER, usages=None, ca=True, path_length=path_length)
    chain = chain_of(forged(tmp_path, forge(broad), broad))
    with pytest.raises(TrustError, match="at most one issuing CA") as caught:
        check(*chain)
    assert caught.value.code == tls.CODE_WRONG_ROOT


@pytest.mark.parametrize("uris", [(), ("appliance://c-2",), ("appliance://c-1/node/2",)])
def test_an_intermediate_of_another_cluster_or_of_none_is_refused(tmp_path: Path, uris: tuple[str, ...]) -> None:
    strange = forge(root_of(OURS), name="strange", uris=uris, usages=None, ca=True, path_length=0)
    chain = chain_of(forged(tmp_path, forge(strange), strange))
    with pytest.raises(TrustError, match="expected an issuing CA of 'c-1'") as caught:
        check(*chain)
    assert caught.value.code == tls.CODE_CLUSTER


def test_an_intermediate_of_another_root_is_refused(tmp_path: Path) -> None:
    assert refusal(by_issuing(tmp_path, Authority.create("c-1", now=NOW))).code == tls.CODE_WRONG_ROOT
    assert refusal(by_issuing(tmp_path, Authority.create("c-2", now=NOW))).code == tls.CODE_WRONG_ROOT


def test_a_revoked_issuing_ca_is_refused_and_its_successor_is_not(tmp_path: Path) -> None:
    chain = chain_of(by_issuing(tmp_path))
    revoked = certificate.terms_of(certificate.load_der(chain[1])).key_id
    with pytest.raises(TrustError, match="issuing CA 'CN=issuing c-1' was revoked") as caught:
        check(*chain, revoked=(revoked,))
    assert caught.value.code == tls.CODE_REVOKED
    assert check(*chain_of(by_issuing(tmp_path)), revoked=(revoked,)) == 1


def test_an_expired_issuing_ca_is_named(tmp_path: Path) -> None:
    made = OURS.issue_issuing(now=NOW, days=1)
    node = Issuer.load(made.certificate_pem, made.key.reveal()).issue_node(node=1, addresses=[], now=NOW)
    chain = [der(node.certificate_pem), der(made.certificate_pem), der(ROOT)]
    with pytest.raises(TrustError, match="'CN=issuing c-1' expired") as caught:
        tls.check_validity(chain[1:], now=NOW + 2 * DAY_S)
    assert caught.value.code == tls.CODE_EXPIRED
    with pytest.raises(TrustError, match=r"'CN=appliance node 1' expired .*, as did 'CN=issuing c-1'") as caught:
        tls.check_validity(chain, now=NOW + 2 * DAY_S)
    assert "issuing-ca renew" in caught.value.hint


def test_a_node_certificate_signs_no_other(tmp_path: Path) -> None:
    node = forge(root_of(OURS), name="node")
    error = refusal(forged(tmp_path, forge(node), node))
    assert error.code in {tls.CODE_PURPOSE, tls.CODE_WRONG_ROOT}


def test_an_intermediate_alone_is_no_anchor(tmp_path: Path) -> None:
    issuing = forge(root_of(OURS), name="issuing", uris=OF_CLUSTER, usages=None, ca=True, path_length=0)
    leaf = forge(issuing)
    assert refusal(forged(tmp_path, leaf), issuing.pem.decode()).code == tls.CODE_WRONG_ROOT


def test_anything_else_openssl_finds_is_told_in_its_words(tmp_path: Path) -> None:
    error = refusal(forged(tmp_path, forge(root_of(OURS), critical_oid="1.3.6.1.4.1.55555.1")))
    assert error.code == "TRUST-001"
    assert "unhandled critical extension (34)" in error.message


def test_tls_1_2_is_refused_by_both_sides(tmp_path: Path) -> None:
    old = tls.client_context([ROOT])
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|protocol version"), shaken(issued(tmp_path), old):
        pass
    server = issued(tmp_path)
    server.minimum_version = ssl.TLSVersion.TLSv1_2
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|protocol version"),
        shaken(server, tls.client_context([ROOT])),
    ):
        pass


def test_nobody_resumes_a_session(tmp_path: Path) -> None:
    server, client = issued(tmp_path), tls.client_context([ROOT])
    assert server.num_tickets == 0
    with shaken(server, client) as secured:
        assert secured.session is None or not secured.session.has_ticket


# ----------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("made_at", "says"), [(2 * DAY_S, "expired at 1970-04-03"), (4_070_908_800, "is valid from 2098-12-31")]
)
def test_the_handshake_knows_no_clock_and_check_validity_does(tmp_path: Path, made_at: int, says: str) -> None:
    authority = Authority.create("c-1", now=made_at)
    chain = chain_of(issued(tmp_path, authority, now=made_at), authority.certificate_pem.decode())
    assert check(*chain) == 1
    tls.check_validity(chain, now=made_at)
    with pytest.raises(TrustError, match=says) as caught:
        tls.check_validity(chain, now=NOW)
    assert "CN=appliance node 1" in caught.value.message
    assert "it is 2026-09-21" in caught.value.message


def test_validity_ends_where_the_certificate_says() -> None:
    leaf = der(OURS.issue_node(node=1, addresses=[], now=NOW).certificate_pem)
    first, last = NOW - DAY_S, NOW + 90 * DAY_S
    for now in (first, NOW, float(last)):
        tls.check_validity([leaf], now=now)
    with pytest.raises(TrustError, match="is valid from") as early:
        tls.check_validity([leaf], now=first - 1)
    assert early.value.code == tls.CODE_NOT_YET
    with pytest.raises(TrustError, match="expired at") as late:
        tls.check_validity([leaf], now=last + 1)
    assert late.value.code == tls.CODE_EXPIRED


def test_an_expired_root_is_named_although_the_node_is_valid() -> None:
    old = forge(None, name="old root", ca=True)
    leaf = OURS.issue_node(node=1, addresses=[], now=NOW)
    with pytest.raises(TrustError, match="'CN=old root' expired"):
        tls.check_validity([der(leaf.certificate_pem), old.der], now=NOW + 2 * DAY_S)


# ----------------------------------------------------------------------------------------------- contexts


def test_a_renewed_certificate_comes_in_on_the_live_context(tmp_path: Path) -> None:
    context = issued(tmp_path)
    paths = (tmp_path / "node.pem", tmp_path / "node.key")
    with shaken(context, tls.client_context([ROOT])) as old_link:
        before = tls.peer_chain(old_link)[0]
        renewed = OURS.issue_node(node=1, addresses=[], now=NOW + DAY_S)
        tls.reload(context, *files(tmp_path, renewed.certificate_pem, renewed.key.reveal()))
        # The link that exists goes on.
        assert old_link.send(b"x") == 1
    assert chain_of(context)[0] == der(renewed.certificate_pem) != before

    # Half a pair is refused, and the live context keeps what it has.
    paths[0].write_bytes(OURS.issue_node(node=1, addresses=[], now=NOW).certificate_pem)
    with pytest.raises(TrustError, match="no certificate with its key"):
        tls.reload(context, *paths)
    paths[0].unlink()
    with pytest.raises(StorageError, match="can't read"):
        tls.reload(context, *paths)
    assert chain_of(context)[0] == der(renewed.certificate_pem)


def test_certificate_and_key_may_be_one_file(tmp_path: Path) -> None:
    node = OURS.issue_node(node=1, addresses=[], now=NOW)
    both = tmp_path / "node.pem"
    both.write_bytes(node.certificate_pem + node.key.reveal())
    assert check(*chain_of(tls.server_context(both, both))) == 1


@pytest.mark.parametrize("certificate_pem", [b"", b"garbage"])
def test_a_server_without_a_certificate(tmp_path: Path, certificate_pem: bytes) -> None:
    key = OURS.issue_node(node=1, addresses=[], now=NOW).key.reveal()
    with pytest.raises(TrustError, match="no certificate with its key"):
        tls.server_context(*files(tmp_path, certificate_pem, key))


def test_an_encrypted_node_key_is_refused_without_asking_on_the_terminal(tmp_path: Path) -> None:
    pair = root_of(OURS)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    encrypted = pair.key.private_bytes(*form, serialization.BestAvailableEncryption(b"passphrase"))
    with pytest.raises(TrustError, match="the node's key is encrypted"):
        tls.server_context(*files(tmp_path, pair.pem, encrypted))


def test_a_client_without_a_root_is_none() -> None:
    with pytest.raises(TrustError, match="no root CA"):
        tls.client_context([])
    with pytest.raises(TrustError, match="no PEM certificate"):
        tls.client_context(["garbage"])


def test_the_clients_context_looks_at_everything_but_clock_and_name() -> None:
    context = tls.client_context([ROOT])
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert not context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_flags & 0x200000
    assert not context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
    assert context.cert_store_stats() == {"x509": 1, "crl": 0, "x509_ca": 1}


# ----------------------------------------------------------------------------------------------- peer_chain


class OldCertificate:
    """`_ssl.Certificate` up to Python 3.12."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def public_bytes(self, encoding: int) -> bytes:
        assert encoding == 2  # DER
        return self.raw


class OldInner:
    """`SSLSocket._sslobj` up to Python 3.12."""

    def __init__(self, chain: list[bytes] | None) -> None:
        self._chain = chain

    def get_verified_chain(self) -> list[OldCertificate] | None:
        return None if self._chain is None else [OldCertificate(raw) for raw in self._chain]


class OldSocket:
    """`SSLSocket` up to Python 3.12, as far as `peer_chain` looks at it."""

    def __init__(self, inner: OldInner | None) -> None:
        self._sslobj = inner


class NewSocket:
    """`SSLSocket` from Python 3.13 on."""

    def __init__(self, chain: list[bytes]) -> None:
        self._chain = chain

    def get_verified_chain(self) -> list[bytes]:
        return self._chain


@pytest.mark.parametrize(
    ("sock", "expected"),
    [
        (NewSocket([b"leaf", b"root"]), [b"leaf", b"root"]),
        (OldSocket(OldInner([b"leaf", b"root"])), [b"leaf", b"root"]),
    ],
)
def test_the_chain_is_found_in_every_version_of_the_interpreter(sock: ssl.SSLSocket, expected: list[bytes]) -> None:
    assert tls.peer_chain(sock) == expected


@pytest.mark.parametrize("sock", [NewSocket([]), OldSocket(OldInner(None)), OldSocket(None)])
def test_a_peer_without_a_certificate(sock: ssl.SSLSocket) -> None:
    with pytest.raises(TrustError, match="showed no certificate"):
        tls.peer_chain(sock)
