"""Tells the controller on this machine of a built image, by the agent's own program: `appliance image add`."""

from __future__ import annotations

from pathlib import Path

from appliance.errors import ApplianceError, ImageError
from appliance.runtime import child
from image_builder import agent as agent_files
from image_builder.agent import Agent

TIMEOUT_S = 60.0


def _program(agent: Agent, root: Path) -> list[str]:
    return [str((agent.directory / agent_files.PROGRAM).absolute()), "--root", str(root), "image"]


def check(agent: Agent, root: Path) -> None:
    """Asks the controller for its ledger: that it can't be reached is found out before the work, not after it.

    Raises:
        ChildError: no controller answers below `root`; with the command to paste.
    """
    child.run([*_program(agent, root), "list", "--json"], timeout_s=TIMEOUT_S)


def add(agent: Agent, root: Path, report: Path) -> None:
    """Takes the image of `report` into the ledger.

    Raises:
        ImageError: it isn't in the ledger; the image stays, and the hint says how to add it.
    """
    command = [*_program(agent, root), "add", str(report.absolute()), "--json"]
    try:
        child.run(command, timeout_s=TIMEOUT_S)
    except ApplianceError as error:
        raise ImageError(
            f"the image is built, but not in the controller's ledger: {error.message}",
            hint=f"its files stay; on the controller: appliance image add {report.name}",
        ) from None
