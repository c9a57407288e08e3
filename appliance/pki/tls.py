"""TLS between an SE that enrolls and a controller node: contexts, and the verdict on the peer's certificate.

An SE decides in three steps, because a fresh VM may think it is 1970 or 2099:

    1. handshake with `client_context`: the chain ends in a trusted root, signatures, path lengths and usages are
       right; neither clock nor address is looked at (NAT changes addresses)
    2. `check_peer`: the leaf is a node of this cluster, for serverAuth, and not revoked; between it and the root
       stand at most an issuing CA of this cluster that is not revoked, and the keys of later roots, each as the root
       before it certified it
    3. `check_validity` of `peer_chain`, once the caller knows a time it may believe

Skipping the second or third step isn't this module's to notice; `se.enroll` is the only caller.
"""

from __future__ import annotations

import _ssl
import ssl
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NoReturn

from cryptography.hazmat.primitives import serialization

from appliance.errors import StorageError, TrustError
from appliance.pki.certificate import SET_BACK, CertificateTerms, load_der, load_pem, moment, terms_of
from appliance.protocol.trust import MAX_ROOT_CHANGES

_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME (OpenSSL, X509_VERIFY_PARAM_set_flags(3)); Python has no name for it."""

CODE_WRONG_ROOT: Final = "TRUST-002"
CODE_CLUSTER: Final = "TRUST-003"
CODE_REVOKED: Final = "TRUST-004"
CODE_PURPOSE: Final = "TRUST-005"
CODE_EXPIRED: Final = "TRUST-006"
CODE_NOT_YET: Final = "TRUST-007"

_UNKNOWN_ISSUER: Final = frozenset({2, 7, 18, 19, 20, 21})
"""X509_V_ERR_: unable to get (local) issuer, wrong signature, self-signed leaf or chain (OpenSSL, x509_vfy.h)."""
_PATH_LENGTH: Final = frozenset({22, 25})
_PURPOSE: Final = frozenset({26, 79})


def server_context(certificate_path: Path, key_path: Path) -> ssl.SSLContext:
    """Returns a controller node's context: TLS 1.3 alone, HTTP/1.1 alone, no session tickets.

    Args:
        certificate_path: PEM, the node's certificate first, then an intermediate if there is one.
        key_path: PEM, unencrypted; may be the same file.

    Raises:
        TrustError: the two don't belong together, or hold something else.
        StorageError: one can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    # A nonce and an enrollment are one connection: nobody resumes, so no ticket key need be kept secret.
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    _load(context, certificate_path, key_path)
    return context


def reload(context: ssl.SSLContext, certificate_path: Path, key_path: Path) -> None:
    """Gives a live server context a renewed certificate; connections that exist keep the old one.

    The pair is tried on a context of its own first: a failed load would leave the live one with half a pair.

    Raises:
        TrustError, StorageError: as `server_context`; the live context keeps what it has.
    """
    server_context(certificate_path, key_path)
    _load(context, certificate_path, key_path)


def _load(context: ssl.SSLContext, certificate_path: Path, key_path: Path) -> None:
    try:
        context.load_cert_chain(certificate_path, key_path, password=_refuse_passphrase)
    except ssl.SSLError as error:
        raise TrustError(
            f"{certificate_path} and {key_path} are no certificate with its key: {error.reason or error}",
            hint="issue the node's certificate anew",
        ) from None
    except OSError as error:
        raise StorageError(f"can't read {certificate_path} or {key_path}: {error.strerror}") from error


def _refuse_passphrase() -> NoReturn:
    # Without this callback OpenSSL asks on the terminal, and a daemon stands still.
    raise TrustError("the node's key is encrypted", hint="node keys are stored unencrypted, mode 0600")


def client_context(roots: Sequence[str]) -> ssl.SSLContext:
    """Returns an SE's context: TLS 1.3 alone, the chain must end in one of `roots`; no clock, no host name.

    Args:
        roots: PEM certificates, one each.

    Raises:
        TrustError: no root, or one that is no certificate.
    """
    if not roots:
        raise TrustError("there is no root CA to verify a controller with", hint="bake the seed anew")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # In this order: `~` of an IntFlag leaves out bits it has no name for, and with them _NO_CHECK_TIME.
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags |= _NO_CHECK_TIME | ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    for root in roots:
        context.load_verify_locations(cadata=load_pem(root).public_bytes(serialization.Encoding.DER))
    return context


def peer_chain(sock: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    """Returns the peer's verified chain as DER, leaf first, root last.

    Raises:
        TrustError: the peer showed no certificate.
    """
    if hasattr(sock, "get_verified_chain"):  # Python 3.13
        chain = [bytes(der) for der in sock.get_verified_chain()]
    else:
        # Until then the same is there, one level down.
        inner = getattr(getattr(sock, "_sslobj", None), "get_verified_chain", lambda: None)
        chain = [certificate.public_bytes(_ssl.ENCODING_DER) for certificate in inner() or ()]
    if not chain:
        raise TrustError("the controller showed no certificate")
    return chain


def check_peer(chain_der: Sequence[bytes], *, cluster_id: str, revoked_node_keys: Collection[str]) -> CertificateTerms:
    """Checks that the leaf of a verified chain is a node of `cluster_id` that still counts, and so does its issuer.

    Args:
        chain_der: as `peer_chain` gives it, from the leaf to the root.
        cluster_id: the SE's own cluster.
        revoked_node_keys: key ids (SHA-256 of SubjectPublicKeyInfo, hex) of the trust document; issuing CAs' too.

    Raises:
        TrustError: another cluster, no node, no serverAuth, revoked; a CA in between that may not be there.
    """
    terms = terms_of(load_der(chain_der[0]))
    if terms.cluster_id != cluster_id:
        raise TrustError(
            f"the controller's certificate names cluster {terms.cluster_id!r}, expected {cluster_id!r}",
            hint="this SE belongs to another cluster; check the controller address",
            code=CODE_CLUSTER,
        )
    if terms.node is None or terms.is_authority:
        raise TrustError(f"certificate {terms.subject!r} is not a node's", code=CODE_PURPOSE)
    if not terms.serves_tls:
        raise TrustError(
            f"the certificate of node {terms.node} is not meant for TLS servers (no serverAuth usage)",
            hint="issue the node's certificate anew",
            code=CODE_PURPOSE,
        )
    if terms.key_id in revoked_node_keys:
        raise TrustError(
            f"the key of node {terms.node} was revoked",
            hint="take the node out of service, or issue it a new certificate",
            code=CODE_REVOKED,
        )
    _check_between(chain_der[1:-1], cluster_id, revoked_node_keys)
    return terms


def _check_between(between_der: Sequence[bytes], cluster_id: str, revoked_keys: Collection[str]) -> None:
    """Checks what stands between leaf and root; OpenSSL has looked at signatures and path lengths.

    A self-issued certificate doesn't count against a path length (RFC 5280, section 4.2.1.9), so an issuing CA could
    certify another of its own name. Such are taken at the root's side alone, without a gap: there each was signed by
    the root, or by a root that the one before it certified.
    """
    between = [terms_of(load_der(der)) for der in between_der]
    for terms in between:
        if terms.cluster_id != cluster_id or terms.node is not None:
            raise TrustError(
                f"the controller's certificate was issued by {terms.subject!r} of cluster {terms.cluster_id!r}, "
                f"expected an issuing CA of {cluster_id!r}",
                hint="this SE belongs to another cluster; check the controller address",
                code=CODE_CLUSTER,
            )
        if terms.key_id in revoked_keys:
            raise TrustError(
                f"the issuing CA {terms.subject!r} was revoked",
                hint="on the controller: `appliance controller issuing-ca renew`",
                code=CODE_REVOKED,
            )
    issuing, later = list(between), 0
    while issuing and issuing[-1].is_self_issued:
        issuing.pop()
        later += 1
    if later > MAX_ROOT_CHANGES:
        raise TrustError(
            f"the controller's root lies {later} changes of root after the newest one that this SE knows, "
            f"at most {MAX_ROOT_CHANGES} are followed",
            hint="give this SE a new seed and a rejoin token: `appliance enroll --anew --seed PATH --token -`",
            code=CODE_WRONG_ROOT,
        )
    if len(issuing) > 1 or any(terms.is_self_issued or terms.path_length != 0 for terms in issuing):
        raise TrustError(
            "the controller's certificate chain is none that a cluster makes: at most one issuing CA (path length 0) "
            "may stand below the root",
            hint="issue the node's certificate from the root or its issuing CA",
            code=CODE_WRONG_ROOT,
        )


def is_of_later_root(chain_der: Sequence[bytes]) -> bool:
    """Whether a verified chain ends in a root that was replaced since: its issuer is a later root, certified by it."""
    return any(terms_of(load_der(der)).is_self_issued for der in chain_der[1:-1])


def check_validity(chain_der: Sequence[bytes], *, now: float) -> None:
    """Checks that every certificate of a chain is valid at `now`, seconds since 1970.

    Raises:
        TrustError: names the certificate, its term and `now`; and an issuing CA that ended with it.
    """
    chain = [terms_of(load_der(der)) for der in chain_der]
    ended = [terms.subject for terms in chain[1:-1] if now > terms.not_after]
    for terms in chain:
        if now < terms.not_before:
            raise TrustError(
                f"certificate {terms.subject!r} is valid from {moment(terms.not_before)}, it is {moment(now)}",
                hint="check the clocks of the controller and this machine",
                code=CODE_NOT_YET,
            )
        if now > terms.not_after:
            also = f", as did {ended[0]!r}, which issued it" if ended and terms is chain[0] else ""
            raise TrustError(
                f"certificate {terms.subject!r} expired at {moment(terms.not_after)}{also}; it is {moment(now)}",
                hint="on the controller: `appliance controller issuing-ca renew`"
                if ended
                else "renew the controller's certificate, or check the clocks",
                code=CODE_EXPIRED,
            )


def explain(error: ssl.SSLCertVerificationError) -> TrustError:
    """Returns what a failed handshake means, with what to do."""
    if error.verify_code in _UNKNOWN_ISSUER:
        return TrustError(
            "the controller's certificate isn't signed by a root CA this SE trusts",
            hint="wrong controller address, something in between that opens TLS, or a seed of another cluster; "
            f"{SET_BACK}",
            code=CODE_WRONG_ROOT,
        )
    if error.verify_code in _PATH_LENGTH:
        return TrustError(
            "the controller's certificate chain is too long: at most one intermediate may stand below the root",
            hint="issue the node's certificate from the root or its issuing CA",
            code=CODE_WRONG_ROOT,
        )
    if error.verify_code in _PURPOSE:
        return TrustError(
            "the controller's certificate is not meant for TLS servers, or its issuer is no CA",
            hint="issue the node's certificate anew",
            code=CODE_PURPOSE,
        )
    return TrustError(
        f"the controller's certificate doesn't hold: {error.verify_message} ({error.verify_code})",
        hint="see `appliance why` on the controller",
    )
