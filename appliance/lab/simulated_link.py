"""The SSH client of simulated SEs: asyncssh's, with options made once for all of them.

asyncssh reads the environment, users and default keys to make the options of one connection, which takes as long as the
key exchange. All SEs of a process differ in their keys alone.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Sequence

import asyncssh
from asyncssh.auth import _ClientPublicKeyAuth

from appliance.controller.connection import Plain
from appliance.errors import TunnelError
from appliance.pki.identity import Identity
from appliance.protocol import tunnel


class TurnError(TunnelError):
    """The gateway has too many log-ins; its slot for this one is in `wait_s` seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the gateway is busy; our turn is in {wait_s:.1f} s")
        self.wait_s = wait_s


class _Connection(Plain, asyncssh.SSHClientConnection):
    """One link."""

    slot_s: float | None = None
    _has_heard = False

    def try_next_auth(self, *, next_method: bool = False) -> None:
        # Its only key, and not `none` first, which asks what else there is.
        if self._auth is None and not next_method:
            self._auth = _SignedAtOnce(self, b"publickey")
        else:
            self._auth_methods = []
            super().try_next_auth()

    def data_received(self, data: bytes, datatype: asyncssh.DataType = None) -> None:
        if not self._has_heard:
            self._has_heard = True
            self.slot_s = tunnel.read_slot(data)
        super().data_received(data, datatype)


class _SignedAtOnce(_ClientPublicKeyAuth):
    """Signs with the first request, as an SE's paramiko does, and doesn't ask before whether the key will do."""

    async def _start(self) -> None:
        self._keypair = await self._conn.public_key_auth_requested()
        await self._send_signed_request()


class _LogIn(asyncssh.SSHClient):
    """Offers one SE's key, once."""

    def __init__(self, key: asyncssh.SSHKey) -> None:
        self._key: asyncssh.SSHKey | None = key

    def public_key_auth_requested(self) -> asyncssh.SSHKey | None:
        key, self._key = self._key, None
        return key


@functools.lru_cache(maxsize=8)
def _options(user: str, host_keys: tuple[str, ...]) -> asyncssh.SSHClientConnectionOptions:
    return asyncssh.SSHClientConnectionOptions(
        username=user,
        client_keys=None,
        known_hosts=([asyncssh.import_public_key(line) for line in host_keys], [], []),
        kex_algs=list(tunnel.KEX),
        encryption_algs=[tunnel.CIPHERS[0]],
        server_host_key_algs=["ssh-ed25519"],
        preferred_auth=["publickey"],
        agent_path=None,
        config=None,
    )


@functools.lru_cache(maxsize=20_000)
def _key(identity: Identity) -> asyncssh.SSHKey:
    return asyncssh.import_private_key(identity.openssh().reveal())


async def connect(
    host: str, port: int, *, user: str, identity: Identity, host_keys: Sequence[str], timeout_s: float
) -> asyncssh.SSHClientConnection:
    """Logs in at a gateway that shows one of `host_keys`.

    Raises:
        TurnError: the gateway has no time now.
        OSError, asyncssh.Error, TimeoutError: no link within `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    options = copy.copy(_options(user, tuple(host_keys)))
    options.waiter = loop.create_future()
    options.protocol_factory = lambda: _LogIn(_key(identity))
    connection: _Connection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_connection(lambda: _Connection(loop, options, wait="auth"), host, port)
            await options.waiter
    except BaseException:
        if connection is not None:
            connection.abort()
            if connection.slot_s is not None:
                raise TurnError(connection.slot_s) from None
        raise
    return connection
