"""06: clocks that are wrong by decades, and controllers that aren't the right ones: UP, or exactly why not; and what
ends soon is told before."""

from __future__ import annotations

import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from lab_rig import RealSe, Site, site
from rig import RunningController, until
from rough import OtherClock

from appliance.pki.authority import Authority
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.why import Step, StepResult

DAY_S = 86400.0
IN_1970 = 1000.0 - time.time()
IN_2099 = 73 * 365.25 * DAY_S


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A controller."""
    with site(tmp_path_factory.mktemp("trust")) as found:
        yield found


@pytest.fixture
def se(at: Site, request: pytest.FixtureRequest) -> Iterator[RealSe]:
    """An SE of its own, not started; `request.param` are its clock's settings."""
    made = at.se(f"se-{len(at.ses) + 1}", clock=getattr(request, "param", {}))
    yield made
    made.end()


@pytest.mark.parametrize(
    "se", [{"offset_s": IN_1970, "synchronised": "no"}, {"offset_s": IN_2099, "synchronised": "no"}],
    indirect=True, ids=["1970", "2099"],
)  # fmt: skip
def test_a_first_boot_that_knows_it_does_not_know_the_time(at: Site, se: RealSe) -> None:
    """It goes by the controller's time and comes up; the wrong clock is told on both sides and decides nothing."""
    se.start()
    until(lambda: se.state == "UP", what="the SE is UP")
    at.until_state(se, "DEGRADED CLOCK_SKEW")
    text = at.controller.operator.se(se.name).summary.text
    assert "clock is off by" in text
    assert at.controller.operator.why(se.name).verdict == "all steps happened"
    assert "this machine's clock is off by" in se.logged()
    # Its clock is set right: nothing of it is left.
    se.stop()
    se.write_settings({}, {})
    se.start()
    at.until_up(se)


@pytest.mark.parametrize(
    ("se", "said", "code"),
    [
        ({"offset_s": IN_1970, "synchronised": "yes"}, "1970-", "TRUST-007"),
        ({"offset_s": IN_2099, "synchronised": "yes"}, "2099-", "TRUST-006"),
    ],
    indirect=["se"], ids=["1970", "2099"],
)  # fmt: skip
def test_a_first_boot_that_believes_a_wrong_clock(at: Site, se: RealSe, said: str, code: str) -> None:
    """A synchronised clock is believed, so the certificate isn't; the SE says what time it goes by."""
    se.start()
    told = until(lambda: se.failed(Step.NONCE), what="the SE says why not")
    assert said in told
    assert f"({code})" in told
    chain = se.why()
    assert chain.verdict.startswith("stopped at nonce: ")
    assert "clock" in next(link.hint for link in chain.steps if link.step is Step.NONCE)
    # The controller's half: it handed out a nonce, and nobody asked for more.
    half = {link.step: link.result for link in at.controller.operator.why("127.0.0.1").steps}
    assert half[Step.NONCE] is StepResult.OK
    uses = at.uses()
    se.stop()
    se.write_settings({}, {})
    se.start()
    at.until_up(se)
    assert at.uses() == uses + 1


def test_a_controller_of_another_root(at: Site, se: RealSe, tmp_path: Path) -> None:
    """The seed is of another cluster at the same address: the handshake ends it, and each side tells its half."""
    seen = (at.enroll.port, at.ssh.port)
    other = RunningController(tmp_path / "other", seen=seen)
    se.bake(next((other.paths.controller_state / "bundles").glob("*.json")))
    se.start()
    told = until(lambda: se.failed(Step.TLS), what="the SE says why not")
    assert "isn't signed by a root CA this SE trusts" in told
    assert se.why().verdict.startswith("stopped at tls: ")
    half = until(
        lambda: (chain := at.controller.operator.why("127.0.0.1")).verdict.startswith("stopped at tls") and chain,
        what="the controller tells its half",
    )
    assert "TLS handshake failed" in half.verdict
    hint = next(link.hint for link in half.steps if link.step is Step.TLS)
    assert "root CA" in hint
    assert all(entry.name != se.name for entry in at.controller.operator.ses())
    # The right seed: the same machine comes in, as another SE than it would have been there.
    se.stop()
    se.bake(at.bundle)
    se.start()
    at.until_up(se)


def test_a_controller_of_the_right_root_and_another_cluster(at: Site, se: RealSe) -> None:
    """One root key that signed for two clusters: the name in the node's certificate decides."""
    state = at.controller.paths.controller_state
    pair = [(state / name, (state / name).read_bytes()) for name in ("node.key", "node.pem")]
    authority = Authority.load((state / "root-ca.pem").read_bytes(), (state / "root-ca.key").read_bytes())
    own, authority.cluster_id = authority.cluster_id, "b5a5fb43-9aa9-4a39-a2d0-6d93ae1d7a2b"
    foreign = authority.issue_node(node=1, addresses=["127.0.0.1"], now=int(time.time()))
    (state / "node.key").write_bytes(foreign.key.reveal())
    (state / "node.pem").write_bytes(foreign.certificate_pem)
    try:
        at.controller.signal(signal.SIGHUP)
        se.start()
        told = until(lambda: se.failed(Step.TLS), what="the SE says why not")
        assert f"'{authority.cluster_id}', expected '{own}'" in told
        # On this side the handshake went well; what never came is the request for a nonce.
        links = {link.step: link for link in at.controller.operator.why("127.0.0.1").steps}
        assert links[Step.TLS].result is StepResult.OK
    finally:
        for path, content in pair:
            path.write_bytes(content)
        at.controller.signal(signal.SIGHUP)
    at.until_up(se)


def test_an_expired_node_certificate(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The controller's clock stands in the past, so it keeps using what expired. SEs that know the time refuse it, SEs
    that don't won't go back behind their seed's date; once the controller's clock is right all of it heals itself."""
    behind_s = 200 * DAY_S
    date = (datetime.now(UTC) - timedelta(seconds=behind_s)).isoformat()
    with site(
        tmp_path_factory.mktemp("expired"), date=date, clock={"offset_s": -behind_s, "synchronised": "yes"}
    ) as at:
        # The first image key is of that time too and has expired meanwhile: image-builder would bake no seed with it.
        bundle = tmp_path_factory.mktemp("bundle") / "bundle.json"
        at.controller.command("image-key", "create", "--expires", "300d", "--out", str(bundle))
        knowing = at.se("knowing", bundle=bundle, clock={"synchronised": "yes"}).start()
        guessing = at.se("guessing", bundle=bundle, clock={"synchronised": "no", "offset_s": IN_1970}).start()
        told = until(lambda: knowing.failed(Step.NONCE), what="the SE says why not")
        assert "expired" in told or "until" in told
        assert "(TRUST-006)" in told
        told = until(lambda: guessing.failed(Step.NONCE), what="the SE says why not")
        assert "the controller says it is" in told
        assert at.uses() == 0
        assert at.controller.stop() == 0
        settings = at.controller.paths.settings_file
        settings.write_text(settings.read_text().partition("[clock]")[0])
        at.controller.start()
        until(lambda: "the node certificate was renewed" in at.controller.log.read_text(), what="it is renewed")
        at.until_up(knowing)
        at.until_state(guessing, "DEGRADED CLOCK_SKEW")


def gauges(controller: RunningController) -> dict[str, int]:
    """When what ends, as the controller's metrics tell."""
    with urllib.request.urlopen(f"http://127.0.0.1:{controller.bound['metrics_port']}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = re.findall(r'^appliance_expiry_timestamp_seconds\{what="([^"]+)"\} (\d+)$', text, re.MULTILINE)
    return {what: int(ends) for what, ends in found}


def test_what_ends_soon_is_told_30_7_and_2_days_before(tmp_path: Path) -> None:
    """On one controller that runs on while time passes. An image key of a month isn't warned of in its first half."""
    clock, controller = OtherClock(tmp_path / "clock"), RunningController(tmp_path / "root")
    operator = controller.operator
    try:
        controller.start(wrap=clock.wrap)
        end = operator.controller().root_expires_at

        def left(days: int) -> None:
            """The root CA has so many days left, and the controller looks."""
            clock.jump(end - days * DAY_S - time.time())
            controller.signal(signal.SIGHUP)

        def image_key(days: int) -> str:
            made = operator.create_image_key(ImageKeyTermsWish(expires_in_s=days * int(DAY_S)))
            return f"image key {made.key.image_key_id}"

        def told(kind: str) -> list[str]:
            return [event.text for event in operator.events() if event.kind == kind]

        left(61)
        until(lambda: told("node.renewed"), what="a node certificate that ends with the root CA")
        advice = {
            "root CA": "`appliance controller rotate-ca begin` replaces it",
            "node certificate": "it ends with the root CA",
            image_key(61): "`appliance image-key create` makes another",
        }
        left(31)
        month = image_key(31)
        assert not [text for text in operator.status().problems if "expire" in text]
        said: list[str] = []
        for days, text in ((29, "29 days"), (6, "6 days"), (1, "1 day")):
            if days == 6:
                advice[month] = "`appliance image-key create` makes another"
            left(days)
            sentences = [f"the {what} expires in {text}: {what_to_do}" for what, what_to_do in advice.items()]
            said += sentences
            until(lambda last=sentences[-1]: last in told("trust.expires"), what=f"events at {text}")
            assert told("trust.expires") == said
            assert [text for text in operator.status().problems if "expire" in text] == sentences
            ends = gauges(controller)
            assert set(ends) == {*advice, month}
            assert all(abs(at - end) < 60 for at in ends.values())
    finally:
        controller.end()
        clock.close()
