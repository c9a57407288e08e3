"""`image` against an operator API on a real unix socket: what is shown, what is asked, and what is told on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import operator_double as doubles
import pytest
from image_reports import report
from operator_double import OperatorDouble

from appliance.cli.root import main
from appliance.protocol.fleet import Reason, State
from appliance.protocol.operator import ImageDetail, ImageList, ImageRevoked, ImageView
from appliance.protocol.problem import Problem

Cli = Callable[..., tuple[int, str, str]]
IMAGE = "seed-0123456789abcdef"


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*args: str) -> tuple[int, str, str]:
        code = main(["--root", str(tmp_path), "image", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OperatorDouble]:
    with doubles.serve(tmp_path / "run/appliance/controller.sock") as served:
        yield served


def view(**changes: Any) -> ImageView:
    fields: dict[str, Any] = {
        "image_id": IMAGE,
        "name": "edge",
        "status": "live",
        "image_key_id": "ik-0123456789ab",
        "ses": 2,
        "key_uses": 2,
        "key_max_uses": 500,
        "key_expires_at": 4_000_000_000,
        "baked_at": 900,
        "added_at": 1000,
        "files": [("edge.qcow2", "11" * 32)],
    }
    return ImageView(**{**fields, **changes})


def revoked(*states: State, **changes: Any) -> ImageRevoked:
    ses = [doubles.summary(number + 1, state=state, reason=Reason.OK) for number, state in enumerate(states)]
    fields: dict[str, Any] = {
        "image": view(status="revoked"), "key_revoked": True, "others": [], "ses": ses, "by_key": [],
    }  # fmt: skip
    return ImageRevoked(**{**fields, **changes})


def test_add_sends_the_report_and_tells_the_digests(double: OperatorDouble, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "edge.image.json"
    file.write_bytes(msgspec.json.encode(report()))
    double.answers["POST /v1/images"] = view()
    code, out, _ = cli("add", str(file))
    assert code == 0
    assert json.loads(double.requests[-1].body) == msgspec.to_builtins(report())
    assert f"edge is in the ledger as {IMAGE}" in out
    assert "11" * 32 + "  edge.qcow2" in out


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 100_000, b'{"schema": 1}', b'{"schema": 1, "schema": 1}', None])
def test_what_is_no_report_is_never_sent(
    double: OperatorDouble, cli: Cli, tmp_path: Path, content: bytes | None
) -> None:
    good, file = tmp_path / "good.image.json", tmp_path / "x.image.json"
    good.write_bytes(msgspec.json.encode(report()))
    if content is not None:
        file.write_bytes(content)
    code, _, err = cli("add", str(good), str(file))
    assert code == 2
    assert "x.image.json" in err
    assert not double.requests, "all are read before the first is sent"


def test_the_ledger_is_listed_and_what_it_lacks_is_told(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/images"] = ImageList(images=[], unknown=[])
    assert "appliance image add" in cli("list")[1]
    assert "no image that isn't in the ledger" in cli("list", "--unknown")[1]
    strange = ImageView(image_id="\x1b[2Jx", name="", status="unknown", image_key_id="ik-1", ses=7)
    double.answers["GET /v1/images"] = ImageList(images=[view(), view(status="key expired")], unknown=[strange])
    out = cli("list")[1]
    assert "2/500" in out
    assert "key expired" in out
    assert "1 image that the ledger doesn't have" in out
    unknown = cli("list", "--unknown")[1]
    assert "unknown" in unknown
    assert "\x1b" not in unknown, "an id is an SE's word, it doesn't get to drive the terminal"


def test_one_image_is_shown_whole(double: OperatorDouble, cli: Cli) -> None:
    shown = view(revoked_at=2000, reason="leaked", also=["seed-00000000000000b2"], status="revoked")
    double.answers["GET /v1/images/edge"] = ImageDetail(image=shown, ses=[doubles.summary(1)])
    out = cli("show", "edge")[1]
    for text in (IMAGE, "seed-00000000000000b2", "leaked", "2 of 500 uses", "11" * 32, "se-1"):
        assert text in out
    double.answers["GET /v1/images/x"] = ImageDetail(image=view(added_at=0, name="", status="unknown"), ses=[])
    assert "2 SEs, by their own word; nobody added it" in cli("show", "x")[1]


@pytest.mark.parametrize(
    ("options", "key"), [((), "ask"), (("--key",), "revoke"), (("--keep-key",), "keep"), (("--kick",), "ask")]
)
def test_revoke_says_what_becomes_of_the_key(
    double: OperatorDouble, cli: Cli, options: tuple[str, ...], key: str
) -> None:
    double.answers["POST /v1/images/edge/revoke"] = revoked()
    code, out, _ = cli("revoke", "edge", "--reason", "leaked", *options)
    assert code == 0
    assert json.loads(double.requests[-1].body) == {"reason": "leaked", "key": key}
    assert "ik-0123456789ab is revoked with it" in out
    assert "no SE names it" in out


def test_revoke_names_who_came_and_who_else_has_the_key(double: OperatorDouble, cli: Cli) -> None:
    double.answers["POST /v1/images/edge/revoke"] = revoked(
        State.UP, key_revoked=False, others=[view(name="other")], by_key=[doubles.summary(9)]
    )
    out = cli("revoke", "edge", "--keep-key")[1]
    for text in (
        "is left as it was",
        "the same image key is in other",
        "named by 1 SE",
        "with another image named, or none: 1 SE",
    ):
        assert text in out
    assert len(double.requests) == 1, "without --kick SEs are left alone"


def test_a_kick_goes_on_over_who_can_not_be_kicked_and_fails_at_the_end(double: OperatorDouble, cli: Cli) -> None:
    double.answers["POST /v1/images/edge/revoke"] = revoked(State.UP, State.PENDING, State.REVOKED, State.DOWN)
    ids = [doubles.summary(number).se_id for number in range(1, 5)]
    detail = doubles.detail(doubles.summary(1))
    double.answers[f"POST /v1/ses/{ids[0]}/revoke"] = Problem(
        type="/problems/STORE-001", title="the disk is full", status=503, code="STORE-001"
    )
    double.answers[f"POST /v1/ses/{ids[1]}/reject"] = detail
    double.answers[f"POST /v1/ses/{ids[3]}/revoke"] = detail
    code, out, err = cli("revoke", "edge", "--kick", "--json")
    assert code == 1
    asked = [request.path for request in double.requests[1:]]
    assert asked == [f"/v1/ses/{ids[0]}/revoke", f"/v1/ses/{ids[1]}/reject", f"/v1/ses/{ids[3]}/revoke"]
    assert all(json.loads(request.body)["reason"] == f"image {IMAGE} revoked" for request in double.requests[1:])
    kicked = json.loads(out)["kicked"]
    assert [entry["error"] for entry in kicked] == ["still stands: the disk is full", "", ""]
    assert "1 SE of the image could not be kicked: se-1" in json.loads(err)["title"]


def test_contradicting_options_change_nothing(double: OperatorDouble, cli: Cli) -> None:
    assert cli("revoke", "edge", "--key", "--keep-key")[0] == 2
    assert not double.requests
