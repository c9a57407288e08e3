"""`appliance controller`: make a cluster on this machine, and look at its controller."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from appliance.cli import output
from appliance.cli.backup import DATE, backup, restore
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.output import Cell, Styled
from appliance.cli.passphrase import issuing_ca, passphrase, passphrase_option, read_passphrase
from appliance.cli.recovery import recovery
from appliance.cli.rotation import rotation_group
from appliance.errors import UsageError
from appliance.protocol.address import format_endpoint, parse_endpoint

_WARN_S = 30 * 86400


class Made(msgspec.Struct, kw_only=True):
    """What `init --json` prints."""

    cluster_id: str
    root_fingerprint: str
    image_key_id: str
    bundle: str


_PORT = click.IntRange(1, 65535)


@click.group("controller")
def command() -> None:
    """This machine as a controller."""


@command.command()
@click.option(
    "--address",
    "addresses",
    multiple=True,
    required=True,
    metavar="HOST",
    help="Name or IP by which SEs reach this node; may be repeated, most preferred first.",
)
@click.option("--enroll-port", type=_PORT, help="HTTPS port as SEs see it.  [default: of controller.enroll_listen]")
@click.option("--ssh-port", type=_PORT, help="SSH port as SEs see it.  [default: of controller.ssh_listen]")
@click.option("--date", type=DATE, help="You vouch for this time; needed where the clock isn't synchronised.")
@passphrase_option("--passphrase-file", "the root key's passphrase", default="no passphrase")
@json_option
@pass_context
def init(
    context: CliContext,
    addresses: tuple[str, ...],
    enroll_port: int | None,
    ssh_port: int | None,
    date: int | None,
    passphrase_file: Path | None,
) -> None:
    """Makes a cluster: root CA, this node's keys, and the first image key with its bundle.

    With a passphrase the root key lies encrypted, and an issuing CA, good for a year, signs from day to day.
    """
    from appliance.controller.init import initialise
    from appliance.runtime.clock import SYNCHRONISED, SystemClock

    settings = context.settings
    made = initialise(
        context.paths,
        addresses=list(addresses),
        enroll_port=enroll_port or _port(settings.controller.enroll_listen, "--enroll-port"),
        ssh_port=ssh_port or _port(settings.controller.ssh_listen, "--ssh-port"),
        clock=SystemClock(settings.clock.offset_s, SYNCHRONISED[settings.clock.synchronised]),
        date=date,
        passphrase=read_passphrase(passphrase_file, twice=True) if passphrase_file is not None else None,
    )
    if context.json:
        print_json(
            Made(
                cluster_id=made.cluster_id,
                root_fingerprint=made.root_fingerprint,
                image_key_id=made.image_key_id,
                bundle=made.bundle_path,
            )
        )
        return
    console = output.screen()
    output.say(console, Styled(f"cluster {made.cluster_id}", "bold"), " is made")
    output.fields(
        console,
        [
            ("root SHA-256", made.root_fingerprint),
            ("image key", made.image_key_id),
            ("bundle", made.bundle_path),
        ],
    )
    output.say(console, "next: appliance mode set controller")
    output.say(console, f"then: image-builder seed --bundle {made.bundle_path}")
    output.say(
        console,
        Styled("then: appliance controller backup --out FILE, without which a lost disk is a lost fleet", "yellow"),
    )


def _port(listen: str, option: str) -> int:
    _, port = parse_endpoint(listen, default_port=0)
    if port == 0:
        raise UsageError(
            f"the setting {listen!r} leaves the port to the system", hint=f"say what SEs see with {option}"
        )
    return port


@command.command()
@json_option
@pass_context
def show(context: CliContext) -> None:
    """Shows this controller: cluster, trust, certificates, ports."""
    view = context.operator.controller()
    if context.json:
        print_json(view)
        return
    console, now = output.screen(), time.time()

    def expiry(at: int) -> Cell:
        shown = f"{output.moment(at)} ({output.ago(at, now)})"
        return Styled(shown, "bold red") if at < now else Styled(shown, "yellow") if at < now + _WARN_S else shown

    output.say(console, Styled(f"cluster {view.cluster_id}", "bold"))
    output.fields(
        console,
        [
            ("node", f"{view.node}, epoch {view.epoch}"),
            ("version", view.version),
            ("running", f"for {output.duration(now - view.started_at)}, pid {view.pid}"),
            ("enroll", "  ".join(format_endpoint(address, view.enroll_port) for address in view.addresses)),
            ("ssh", "  ".join(format_endpoint(address, view.ssh_port) for address in view.addresses)),
            ("reverse path", f"port {view.reverse_port} of 127.1.0.1 and up"),
            ("metrics", f"http://127.0.0.1:{view.metrics_port}/metrics"),
            ("root SHA-256", view.root_fingerprint),
            ("root key", "under a passphrase" if view.root_is_locked else "without a passphrase"),
            ("root expires", expiry(view.root_expires_at)),
            *([("issuing CA ends", expiry(view.issuing_expires_at))] if view.issuing_fingerprint else []),
            ("node cert", expiry(view.node_certificate_expires_at)),
            ("trust", f"version {view.trust_version}"),
        ],
    )


for _kind, _what in (
    ("ca", "the root CA"),
    ("host-key", "this node's SSH host key"),
    ("login-key", "the key that logs in to SEs"),
):
    command.add_command(rotation_group(_kind, _what))

for _command in (backup, restore, recovery, passphrase, issuing_ca):
    command.add_command(_command)
