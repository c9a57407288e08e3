"""Verifies trust documents, receipts and audit heads: bytes and anchors in, a verdict out; no socket, file or clock.

The rules of a trust document, in this order:

    1. the envelope's type is that of a trust document, and one of the anchors signed it itself
       (the roots of the current document, or the seed's root where there is none)
    2. the body is strict JSON of the document's shape
    3. its cluster is the one the anchors name, and that of the current document
    4. each root in it is one CA certificate (P-256) of that cluster
    5. each key, address and number in it has its one form, so that files can be written of them

Receipts and audit heads may be signed by an issuing CA in a root's name (`pki.envelope`). Whether a good document
takes the place of the current one (rollback) is `protocol.trust.replaces`. Whether a receipt
still counts is the registry's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from appliance.errors import TrustError, UsageError
from appliance.pki.certificate import certificate_terms
from appliance.pki.envelope import verify_envelope
from appliance.pki.ssh_keys import parse_public
from appliance.protocol import strict_json
from appliance.protocol.address import MAX_NODE_NUMBER, MAX_SE_NUMBER, parse_endpoint
from appliance.protocol.enroll import is_se_id
from appliance.protocol.seed import Hints, check_hints
from appliance.protocol.trust import (
    AUDIT_HEAD_TYPE,
    MAX_TRUST_BYTES,
    RECEIPT_TYPE,
    TRUST_TYPE,
    AuditHead,
    Envelope,
    Receipt,
    TrustDocument,
    TrustNode,
)

MAX_ROOTS: Final = 4
MAX_RECEIPT_BYTES: Final = 4 * 1024
MAX_HEAD_BYTES: Final = 1024

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def verify_trust(envelope: Envelope, *, anchors: Sequence[str], current: TrustDocument | None) -> TrustDocument:
    """Returns the document in `envelope` where all rules of the module's docstring hold.

    Args:
        envelope: foreign.
        anchors: PEM root certificates that may sign.
        current: the document in force, if there is one.

    Raises:
        TrustError: a rule that doesn't hold.
        MalformedError: the body is no such document.
    """
    body = verify_envelope(envelope, TRUST_TYPE, anchors)
    document = strict_json.decode(body, TrustDocument, max_bytes=MAX_TRUST_BYTES)
    _check_cluster("trust document", document.cluster_id, anchors)
    if current is not None and document.cluster_id != current.cluster_id:
        raise _other_cluster("trust document", document.cluster_id, current.cluster_id)
    if document.version < 1 or document.epoch < 0:
        raise TrustError(f"trust document of version {document.version}, epoch {document.epoch}: too small")
    _check_roots(document)
    _check_nodes(document.nodes)
    for digest in document.revoked_node_keys:
        if not _DIGEST.fullmatch(digest):
            raise TrustError("trust document: a revoked node key is no SHA-256 in lower-case hex")
    _check_keys([*document.login_keys, *([document.bundle_key] if document.bundle_key else [])])
    return document


def verify_receipt(envelope: Envelope, anchors: Sequence[str], revoked: Collection[str] = ()) -> Receipt:
    """Returns the receipt in `envelope` where one of `anchors` (PEM roots) signed it for their own cluster.

    An issuing CA counts as its root, unless its key id is `revoked`.

    Raises:
        TrustError: signature, type, cluster or form.
        MalformedError: the body is no receipt.
    """
    body = verify_envelope(envelope, RECEIPT_TYPE, anchors, by_issuing=True, revoked=revoked)
    receipt = strict_json.decode(body, Receipt, max_bytes=MAX_RECEIPT_BYTES)
    _check_cluster("receipt", receipt.cluster_id, anchors)
    if not is_se_id(receipt.se_id):
        raise TrustError("receipt: se_id is no random UUID")
    if not 1 <= receipt.number <= MAX_SE_NUMBER:
        raise TrustError(f"receipt: SE number {receipt.number} is outside 1..{MAX_SE_NUMBER}")
    if problems := check_hints(Hints(name=receipt.name, labels=receipt.labels)):
        raise TrustError(f"receipt: {problems[0]}")
    return receipt


def verify_audit_head(envelope: Envelope, anchors: Sequence[str], revoked: Collection[str] = ()) -> AuditHead:
    """Returns the audit head in `envelope` where one of `anchors` (PEM roots) signed it for their own cluster.

    An issuing CA counts as its root, unless its key id is `revoked`.

    Raises:
        TrustError: signature, type, cluster or form.
        MalformedError: the body is no audit head.
    """
    body = verify_envelope(envelope, AUDIT_HEAD_TYPE, anchors, by_issuing=True, revoked=revoked)
    head = strict_json.decode(body, AuditHead, max_bytes=MAX_HEAD_BYTES)
    _check_cluster("audit head", head.cluster_id, anchors)
    if not 1 <= head.node <= MAX_NODE_NUMBER or head.epoch < 0 or head.sequence < 0 or not _DIGEST.fullmatch(head.hash):
        raise TrustError("audit head: node, epoch, sequence or hash is of no chain")
    return head


def _other_cluster(what: str, got: str, expected: str) -> TrustError:
    return TrustError(
        f"{what} of cluster {got[:80]!r}, expected {expected!r}",
        hint="this SE belongs to another cluster; check the controller address",
    )


def _check_cluster(what: str, cluster_id: str, anchors: Iterable[str]) -> None:
    for anchor in anchors:
        expected = certificate_terms(anchor).cluster_id
        if cluster_id != expected:
            raise _other_cluster(what, cluster_id, expected)


def _check_roots(document: TrustDocument) -> None:
    if not 1 <= len(document.roots) <= MAX_ROOTS:
        raise TrustError(f"trust document with {len(document.roots)} roots, 1 to {MAX_ROOTS} expected")
    for pem in document.roots:
        terms = certificate_terms(pem)
        if not terms.is_authority:
            raise TrustError(f"trust document: root {terms.subject!r} is no CA certificate")
        if terms.cluster_id != document.cluster_id or terms.node is not None:
            raise _other_cluster("root certificate", terms.cluster_id, document.cluster_id)


def _check_nodes(nodes: Sequence[TrustNode]) -> None:
    numbers = [node.number for node in nodes]
    if len(set(numbers)) != len(numbers) or not all(1 <= number <= MAX_NODE_NUMBER for number in numbers):
        raise TrustError(f"trust document: node numbers {numbers}, each once within 1..{MAX_NODE_NUMBER} expected")
    for node in nodes:
        _check_keys(node.host_keys)
        try:
            for endpoint in [*node.enroll, *node.ssh]:
                parse_endpoint(endpoint, default_port=0)
        except UsageError as error:
            raise TrustError(f"trust document: node {node.number}: {error}") from None


def _check_keys(lines: Iterable[str]) -> None:
    for line in lines:
        parse_public(line)
