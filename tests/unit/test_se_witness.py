"""se.witness: keeps the newest signed head of each node and epoch, bounded, through restarts and broken files."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
from forgery import NOW

from appliance.errors import StorageError
from appliance.pki.authority import Authority
from appliance.protocol import strict_json
from appliance.protocol.trust import AUDIT_HEAD_TYPE, AuditHead, Envelope, TrustDocument
from appliance.se.believed import Beliefs
from appliance.se.witness import MAX_NODES, Witness
from appliance.storage.document import Document

OURS = Authority.create("c-1", now=NOW)
THEIRS = Authority.create("c-1", now=NOW)


def signed(sequence: int, *, epoch: int = 1, node: int = 1, by: Authority = OURS) -> Envelope:
    head = AuditHead(
        cluster_id="c-1", node=node, epoch=epoch, sequence=sequence, hash=f"{sequence:064x}", time=NOW
    )  # fmt: skip
    return by.sign(AUDIT_HEAD_TYPE, strict_json.encode(head))


def made(tmp_path: Path) -> Witness:
    beliefs = Beliefs(Document(tmp_path / "trust.json", Envelope), authorized_keys=tmp_path / "keys")
    roots = [OURS.certificate_pem.decode()]
    document = TrustDocument(cluster_id="c-1", version=1, epoch=1, signed_at=NOW, roots=roots, nodes=[])
    beliefs.start_from_seed(OURS.sign("t", b"x"), document)
    witness = Witness(tmp_path / "witness.json", beliefs)
    witness.load()
    return witness


def kept(witness: Witness, node: int = 1) -> list[tuple[int, int]]:
    heads = [msgspec.json.decode(envelope.body(), type=AuditHead) for envelope in witness.heads(node)]
    return [(head.epoch, head.sequence) for head in heads]


def test_the_newest_of_each_epoch_is_kept_through_a_restart(tmp_path: Path) -> None:
    witness = made(tmp_path)
    assert witness.heads(1) == []
    for sequence in (5, 9, 7):
        witness.keep(signed(sequence))
    witness.keep(signed(2, epoch=100))
    witness.keep(signed(3, node=2))
    assert kept(witness) == kept(made(tmp_path)) == [(100, 2), (1, 9)]
    assert kept(made(tmp_path), 2) == [(1, 3)]


def test_only_a_root_of_ours_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    witness = made(tmp_path)
    witness.keep(signed(9, by=THEIRS))
    assert witness.heads(1) == []
    assert "is not kept" in caplog.text


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    witness = made(tmp_path)
    for epoch in range(1, 10):
        witness.keep(signed(epoch, epoch=epoch))
    assert kept(witness) == [(9, 9), (8, 8), (7, 7), (6, 6)]
    witness.keep(signed(50, epoch=2))
    assert len(witness.heads(1)) == 4
    for node in range(1, MAX_NODES + 5):
        witness.keep(signed(1, node=node, epoch=1))
    assert [node for node in range(1, 30) if witness.heads(node)] == list(range(1, MAX_NODES + 1))


def test_a_broken_file_costs_a_witness_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path).keep(signed(5))
    (tmp_path / "witness.json").write_text("{")
    witness = made(tmp_path)
    assert witness.heads(1) == []
    assert "set aside" in caplog.text
    witness.keep(signed(6))
    assert kept(made(tmp_path)) == [(1, 6)]


def test_a_full_disk_costs_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    witness = made(tmp_path)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Document, "save", full)
    witness.keep(signed(5))
    assert witness.heads(1) == []
    assert "the disk is full" in caplog.text
