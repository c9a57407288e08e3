"""A heartbeat's short way: what an agent writes, byte for byte, is answered without a parser, a task and a framework.

Nine requests in ten that a controller serves are heartbeats, each alone in its packet and with the head that our agents
write (`se.channel_api`). Such a one, on a connection that rests, goes straight to its handler, and head and body of the
answer leave as one packet. Whatever differs in any byte takes the ordinary way through `listener`, which has the same
handler at its end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from appliance.controller.listener import FrontEnd, GuardedProtocol, HttpLimits
from appliance.controller.web import ProblemError, Response, problem_response, simple_problem, unexpected_problem
from appliance.protocol import strict_json
from appliance.protocol.tunnel import CHANNEL_HOST

_log = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any], bytes], bytes]
"""Takes a connection's state and a request's body, returns the body of a 200."""

_HEAD = (
    r"POST {path} HTTP/1\.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: ([0-9]{{1,7}})\r\n\r\n"
)
_OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b"


class DirectFrontEnd(FrontEnd):
    """A front end on channels, one path of which has a short way."""

    def __init__(self, app: Any, limits: HttpLimits, *, path: str, answer: Answer) -> None:
        super().__init__(app, limits)
        self.head = re.compile(_HEAD.format(path=re.escape(path), host=re.escape(CHANNEL_HOST)).encode("ascii"))
        self.answer = answer

    def protocol(self, **state: Any) -> GuardedProtocol:
        """See `FrontEnd.protocol`."""
        return DirectProtocol(self, state)


class DirectProtocol(GuardedProtocol):
    """HTTP/1.1 as its ancestor serves it, but for requests that are one packet of the known form."""

    _front: DirectFrontEnd

    def __init__(self, front: DirectFrontEnd, state: dict[str, Any]) -> None:
        super().__init__(front, state, None)
        self._spoke_at = 0.0

    def data_received(self, data: bytes) -> None:
        found = self._front.head.match(data) if self._rests_now() else None
        if found is None or len(data) - found.end() != int(found[1]) or int(found[1]) > self._limits.max_body_bytes:
            super().data_received(data)
            return
        self._spoke_at = self.loop.time()
        self.transport.write(self._answered(data[found.end() :]))

    def _rests_now(self) -> bool:
        """Whether nothing is being read, answered or held back, so that the next answer is this request's."""
        return (
            self._reading == ""
            and self.cycle is not None
            and self.cycle.response_complete
            and not self.pipeline
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def _answered(self, body: bytes) -> bytes:
        try:
            answer = self._front.answer(self.app_state, body)
        except ProblemError as error:
            return _rendered(problem_response(error.problem))
        except strict_json.MalformedError as error:
            problem = simple_problem(400, error.code, "The request is malformed", detail=error.message)
            return _rendered(problem_response(problem))
        except Exception:  # noqa: BLE001 - a worker's top: what failed is told to both sides, the link stays
            _log.exception("unexpected error in a heartbeat")
            return _rendered(problem_response(unexpected_problem()))
        return _OK % (len(answer), answer)

    def timeout_keep_alive_handler(self) -> None:
        """The timer of the last request on the ordinary way is over: others may have come since."""
        rested_s = self.loop.time() - self._spoke_at
        if rested_s >= self.timeout_keep_alive:
            super().timeout_keep_alive_handler()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive - rested_s, self.timeout_keep_alive_handler
            )


def _rendered(response: Response) -> bytes:
    head = b"".join(b"%b: %b\r\n" % pair for pair in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%b\r\n%b" % (response.status_code, head, bytes(response.body))
