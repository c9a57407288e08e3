"""Tells all that a client outside the lab needs: ports, paths, keys, process ids, and what the controller says."""

from __future__ import annotations

from appliance import settings
from appliance.errors import UnreachableError
from appliance.lab import processes
from appliance.lab.layout import (
    LOOPBACK,
    ControllerStatus,
    Lab,
    LabStatus,
    Layout,
    Process,
    SePart,
    SeStatus,
    enroll_url,
    metrics_url,
    ssh_command,
)
from appliance.lab.up import Connect, load
from appliance.protocol.fleet import SeSummary


def _pid(process: Process | None) -> int:
    return process.pid if process is not None and processes.is_running(process) else 0


def _controller(layout: Layout, lab: Lab) -> ControllerStatus:
    part, paths = lab.controller, layout.controller
    return ControllerStatus(
        root=str(paths.root),
        running=_pid(part.process) > 0,
        pid=_pid(part.process),
        enroll_url=enroll_url(part),
        ssh_host=LOOPBACK,
        ssh_port=part.ssh_port,
        ssh_user=settings.load(paths, environ={}, overrides={}).users.se,
        ssh_host_key=str(paths.controller_state / "ssh_host_ed25519_key.pub"),
        reverse_port=part.reverse_port,
        metrics_url=metrics_url(part),
        operator_socket=str(paths.controller_socket),
        root_certificate=str(paths.controller_state / "root-ca.pem"),
        trust_document=str(paths.controller_state / "trust.json"),
        login_key=str(paths.controller_state / "id_se"),
        state=str(paths.controller_state),
        settings=str(paths.settings_file),
        log=str(layout.log("controller")),
        health=str(paths.health_file),
        bundle=part.bundle,
    )


def _se(layout: Layout, lab: Lab, part: SePart, summary: SeSummary | None) -> SeStatus:
    paths = layout.se(part.name)
    status = SeStatus(
        name=part.name,
        root=str(paths.root),
        running=_pid(part.process) > 0,
        pid=_pid(part.process),
        sshd_running=_pid(part.sshd) > 0,
        sshd_pid=_pid(part.sshd),
        sshd_port=part.sshd_port,
        sshd_host_key=f"{layout.host_key(part.name)}.pub",
        sshd_log=str(layout.sshd(part.name) / "sshd.log"),
        seed=str(layout.seed(part.name)),
        state=str(paths.se_state),
        identity=str(paths.se_state / "identity.json"),
        settings=str(paths.settings_file),
        log=str(layout.log(part.name)),
        health=str(paths.health_file),
        forward_socket=str(paths.forward_socket),
    )
    if summary is not None:
        status.se_id, status.number, status.address = summary.se_id, summary.number, summary.address
        status.fleet_state, status.reason, status.text = summary.state.value, summary.reason.value, summary.text
        status.ssh = ssh_command(layout, lab, summary.address)
    return status


def status(layout: Layout, *, connect: Connect) -> LabStatus:
    """Returns the lab as it stands; figures of the fleet only where the controller answers.

    Raises:
        UsageError: there is no lab.
    """
    lab = load(layout)
    fleet: dict[str, SeSummary] = {}
    trouble = ""
    try:
        fleet = {se.name: se for se in connect(layout.controller).ses()}
    except UnreachableError as error:
        trouble = error.message
    return LabStatus(
        root=str(layout.root),
        user=lab.user,
        known_hosts=str(layout.known_hosts),
        trouble=trouble,
        controller=_controller(layout, lab),
        ses=[_se(layout, lab, part, fleet.get(part.name)) for part in lab.ses],
    )
