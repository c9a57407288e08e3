"""The enroll hook: an operator's program that says whether a newcomer may come in.

It gets the request's facts as one JSON object on stdin, has `DEADLINE_S`, and answers by its exit code: 0 allows, 10
refuses; anything else, or no answer in time, is no verdict, and the SE waits for an operator's approval instead. It
runs with the daemon's rights, no more, and an environment of its own that holds nothing of ours. A few run at a time,
in threads: the loop and the ledger never wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec

from appliance.errors import ApplianceError
from appliance.protocol.enroll import Hook, InstanceFacts
from appliance.runtime import child

_log = logging.getLogger(__name__)

DEADLINE_S = 5.0
MAX_RUNNING = 8
MAX_WAITING = 64
"""Requests beyond these are told to come again: a slow hook must not pile them up."""

_ANSWERS = {0: Hook.ALLOW, 10: Hook.REFUSE}
_CLEAN = ("env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the hook is told. All but the first four is the VM's own word."""

    se_id: str
    fingerprint: str
    """Of the SE's key, whose signature was verified."""
    image_key_id: str
    source: str
    """The peer's IP address."""
    name: str
    labels: dict[str, str]
    facts: InstanceFacts
    agent_version: str


class EnrollHook:
    """Runs the program. One loop only; `close` at the end.

    Args:
        program: absolute path; "" where there is none.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self._threads = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="enroll-hook")
        self._asked = 0

    @property
    def is_busy(self) -> bool:
        """Whether one more request would have to wait for too long."""
        return self._asked >= MAX_RUNNING + MAX_WAITING

    async def ask(self, facts: Facts) -> Hook:
        """Returns the program's word; failures are told in the log."""
        if not self.program:
            return Hook.SILENT
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, facts)
        finally:
            self._asked -= 1

    def _run(self, facts: Facts) -> Hook:
        try:
            done = child.run(
                [*_CLEAN, self.program], timeout_s=DEADLINE_S, input=msgspec.json.encode(facts) + b"\n", check=False
            )
        except ApplianceError as error:
            _log.error("no verdict of the enroll hook on %s: %s", facts.se_id, error.message, extra={"stage": "enroll"})
            return Hook.SILENT
        answer = _ANSWERS.get(done.returncode, Hook.SILENT)
        _log.info(
            "the enroll hook on %s: %s (exit code %d) %s", facts.se_id, answer.value, done.returncode,
            (done.stderr or done.stdout).strip()[:200], extra={"stage": "enroll"},
        )  # fmt: skip
        return answer

    def close(self) -> None:
        """Takes no more; what runs ends by its deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)
