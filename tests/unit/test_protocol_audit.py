"""The audit chain: an attacker edits the log in every way there is, and `verify` names it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.protocol import audit
from appliance.protocol.audit import HeadVerdict
from appliance.protocol.operator import AuditEntry
from appliance.protocol.trust import AuditHead

GENESIS = audit.genesis("c-1", 1, 1)


def chain(length: int, *, first: int = 1, node: int = 1, epoch: int = 1, start: str = GENESIS) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for sequence in range(first, first + length):
        previous = entries[-1].hash if entries else start
        entries.append(
            audit.seal(
                AuditEntry(
                    sequence=sequence,
                    time=1000.5 + sequence,
                    node=node,
                    epoch=epoch,
                    actor="root",
                    action="se.revoke",
                    subject=f"se-{sequence}",
                    detail="näht",
                    previous=previous,
                )
            )
        )
    return entries


def test_genesis_is_the_hash_of_the_words_of_the_design() -> None:
    assert audit.genesis("abc", 2, 3) != GENESIS
    assert GENESIS == "69ebe45ee4b599a5452526a2531b20c686673aa11a3755610ca8cc282ecffd1c"


def test_canonical_bytes_are_sorted_and_without_the_hash() -> None:
    entry = chain(1)[0]
    fields = msgspec.json.decode(audit.canonical(entry))
    assert "hash" not in fields
    assert list(fields) == sorted(fields)
    assert audit.entry_hash(msgspec.structs.replace(entry, hash="whatever")) == entry.hash


def test_an_untouched_chain_holds() -> None:
    entries = chain(20)
    verdict = audit.verify(iter(entries), start=GENESIS, head=entries[-1].hash)
    assert (verdict.intact, verdict.entries, verdict.head) == (True, 20, entries[-1].hash)


def test_an_empty_chain_holds_and_its_head_is_the_genesis() -> None:
    verdict = audit.verify([], start=GENESIS, head=GENESIS)
    assert (verdict.intact, verdict.entries, verdict.head) == (True, 0, GENESIS)


def test_a_part_of_a_chain_holds_without_a_start() -> None:
    assert audit.verify(chain(10)[4:]).intact


@pytest.mark.parametrize("field", ["time", "actor", "action", "subject", "detail", "previous", "node", "epoch"])
def test_a_changed_field_is_found(field: str) -> None:
    entries = chain(5)
    value: object = 7 if field in {"time", "node", "epoch"} else "changed"
    entries[2] = msgspec.structs.replace(entries[2], **{field: value})
    verdict = audit.verify(entries, start=GENESIS)
    assert not verdict.intact
    assert "entry 3 was changed" in verdict.text
    assert (verdict.entries, verdict.head) == (2, entries[1].hash)


def test_a_changed_first_entry_leaves_nothing_that_holds() -> None:
    entries = chain(2)
    entries[0] = msgspec.structs.replace(entries[0], actor="mallory")
    verdict = audit.verify(entries, start=GENESIS)
    assert (verdict.intact, verdict.entries, verdict.head) == (False, 0, GENESIS)


def test_a_changed_and_sealed_anew_entry_breaks_the_next_one() -> None:
    entries = chain(5)
    entries[2] = audit.seal(msgspec.structs.replace(entries[2], actor="mallory"))
    verdict = audit.verify(entries, start=GENESIS)
    assert "entry 4 does not continue entry 3" in verdict.text


@pytest.mark.parametrize(("cut", "words"), [(slice(2, 3), "entry 3 removed"), (slice(2, 5), "entries 3 to 5 removed")])
def test_removed_entries_are_named(cut: slice, words: str) -> None:
    entries = chain(8)
    del entries[cut]
    assert words in audit.verify(entries, start=GENESIS).text


def test_removed_first_entries_are_found_against_the_genesis() -> None:
    verdict = audit.verify(chain(8)[3:], start=GENESIS)
    assert "begins with entry 4" in verdict.text


def test_removed_last_entries_are_found_by_a_witness_only() -> None:
    entries = chain(8)
    assert audit.verify(entries[:5], start=GENESIS).intact
    verdict = audit.verify(entries[:5], start=GENESIS, head=entries[-1].hash)
    assert not verdict.intact
    assert "cut off" in verdict.text


def test_a_whole_chain_written_anew_for_another_cluster_is_found() -> None:
    verdict = audit.verify(chain(3, start=audit.genesis("c-2", 1, 1)), start=GENESIS)
    assert "does not begin the chain" in verdict.text


def test_swapped_entries_are_called_reordered() -> None:
    entries = chain(6)
    entries[2], entries[3] = entries[3], entries[2]
    assert "reordered: 4 stands before 3" in audit.verify(entries, start=GENESIS).text


def test_a_repeated_entry_is_called_inserted() -> None:
    entries = chain(6)
    entries.insert(4, entries[1])
    assert "entry 2 stands behind 4" in audit.verify(entries, start=GENESIS).text


def test_a_forged_entry_between_two_is_found() -> None:
    entries = chain(6)
    forged = audit.seal(msgspec.structs.replace(entries[2], actor="mallory"))
    entries.insert(2, forged)
    verdict = audit.verify(entries, start=GENESIS)
    assert "entry 3 stands behind 3: one was inserted" in verdict.text


def test_an_entry_of_another_chain_is_found() -> None:
    entries = chain(3)
    foreign = chain(1, first=4, node=2, start=entries[-1].hash)
    assert "of the chain of node 2" in audit.verify(entries + foreign, start=GENESIS).text


@given(data=st.data(), length=st.integers(2, 12))
def test_no_reordering_removal_or_repetition_survives(data: st.DataObject, length: int) -> None:
    entries = chain(length)
    tampered = data.draw(st.lists(st.sampled_from(entries), max_size=length + 1))
    verdict = audit.verify(tampered, start=GENESIS, head=entries[-1].hash)
    assert verdict.intact == (tampered == entries)


# ------------------------------------------------------------------------------- segments, heads and witnesses


def continued(entries: list[AuditEntry], epoch: int, *, cluster: str = "c-1", after: str = "") -> list[AuditEntry]:
    """`entries` and one more, in the epoch of a restore."""
    last = entries[-1]
    entry = AuditEntry(
        sequence=last.sequence + 1, time=5000.0, node=1, epoch=epoch, actor="controller restore",
        action="controller.restored", subject=cluster, detail="",
        previous=audit.genesis("c-1", 1, epoch, after=after or last.hash),
    )  # fmt: skip
    return [*entries, audit.seal(entry)]


def head_of(entry: AuditEntry, **changes: object) -> AuditHead:
    head = AuditHead(
        cluster_id="c-1", node=entry.node, epoch=entry.epoch, sequence=entry.sequence, hash=entry.hash, time=1
    )  # fmt: skip
    return msgspec.structs.replace(head, **changes)


def test_a_restored_chain_goes_on_in_a_new_segment() -> None:
    entries = continued(chain(5), 100)
    assert audit.verify(entries, start=GENESIS, head=entries[-1].hash).intact


@pytest.mark.parametrize("how", [{"cluster": "c-2"}, {"after": "0" * 64}])
def test_a_segment_names_cluster_and_the_entry_before_it(how: dict[str, str]) -> None:
    verdict = audit.verify(continued(chain(5), 100, **how), start=GENESIS)
    assert not verdict.intact
    assert "does not continue entry 5" in verdict.text


def test_entries_removed_before_a_segment_are_found() -> None:
    entries = continued(chain(5), 100)
    del entries[4]
    assert "entry 5 removed" in audit.verify(entries, start=GENESIS).text


def test_no_segment_goes_back_in_time() -> None:
    entries = continued(chain(5, epoch=100, start=audit.genesis("c-1", 1, 100)), 99)
    assert "is of the chain of node 1, epoch 99" in audit.verify(entries).text


def test_a_witness_finds_what_was_cut_off() -> None:
    entries = chain(9)
    heads = [head_of(entries[3]), head_of(entries[8])]
    assert audit.verify(entries, start=GENESIS, witnesses=heads).intact
    verdict = audit.verify(entries[:8], start=GENESIS, witnesses=heads)
    assert not verdict.intact
    assert "remembers entry 9" in verdict.text
    assert not audit.verify([], witnesses=heads).intact
    assert not audit.verify(chain(9, node=2, start=audit.genesis("c-1", 2, 1)), witnesses=heads).intact


def test_a_witness_finds_a_chain_that_was_written_anew() -> None:
    entries = chain(9)
    forged = chain(4)
    forged[3] = audit.seal(msgspec.structs.replace(forged[3], actor="mallory"))
    verdict = audit.verify(forged, start=GENESIS, witnesses=[head_of(entries[3])])
    assert not verdict.intact
    assert "another one than the witness remembers" in verdict.text


def test_a_fault_is_told_before_a_witness_is() -> None:
    entries = chain(4)
    head = head_of(entries[3])
    entries[3] = msgspec.structs.replace(entries[3], actor="mallory", hash="0" * 64)
    assert "was changed" in audit.verify(entries, start=GENESIS, witnesses=[head]).text


def test_what_a_restore_lost_is_told_and_no_fault() -> None:
    entries = continued(chain(5), 100)
    verdict = audit.verify(entries, start=GENESIS, witnesses=[head_of(chain(8)[7])])
    assert verdict.intact
    assert "a witness remembers entry 8 of node 1, epoch 1, which a restore lost" in verdict.text


@pytest.mark.parametrize(
    ("changes", "entry", "epoch", "verdict"),
    [
        ({}, True, 1, HeadVerdict.HOLDS),
        ({}, False, 1, HeadVerdict.AHEAD),
        ({"hash": "0" * 64}, True, 1, HeadVerdict.REWRITTEN),
        ({}, False, 100, HeadVerdict.LOST),
        ({"hash": "0" * 64}, True, 100, HeadVerdict.LOST),
        ({}, True, 100, HeadVerdict.HOLDS),
        ({"epoch": 2}, True, 1, HeadVerdict.AHEAD),
        ({"epoch": 2}, False, 1, HeadVerdict.AHEAD),
    ],
)
def test_a_head_is_judged_by_the_chain(
    changes: dict[str, object], entry: bool, epoch: int, verdict: HeadVerdict
) -> None:
    last = chain(3)[2]
    assert audit.judge_head(head_of(last, **changes), last if entry else None, epoch=epoch) is verdict
