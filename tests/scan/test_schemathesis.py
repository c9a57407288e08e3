"""schemathesis against the three front ends: no 5xx, no undocumented status, bodies conform to their documents.

It makes its requests from each front end's own OpenAPI document, right ones and wrong ones. Two of the three don't
listen on TCP: a relay on loopback leads to the operator's unix socket, and an SE's link to the channel API.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import scanners
from rig import RunningController, machine

from appliance.protocol import tunnel

EXAMPLES = 10

ALLOWED = {
    "positive_data_acceptance": "a schema can't say that signatures hold, that an SE exists, or that a network is one",
}
"""Checks that are left out, and why."""

NO_WAITING = """
[[operations]]
include-path = "/v1/events"
parameters = { wait_s = 0 }
"""
"""A request that may wait for a minute, by its purpose, must not do so a hundred times."""


def scan(folder: Path, url: str, *args: str, settings: str = "") -> subprocess.CompletedProcess[str]:
    file = folder / "schemathesis.toml"
    file.write_text(settings)
    return scanners.run(
        "st", "--config-file", str(file), "run", f"{url}/v1/openapi.json",
        "--checks", "all", "--exclude-checks", ",".join(ALLOWED), "--max-examples", str(EXAMPLES),
        # The same requests in each run: a red run shall be red again. No NUL: no document of ours may hold one.
        "--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--generation-allow-x00", "false",
        "--request-timeout", "20", "--no-color", *args, cwd=folder, timeout_s=300,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def relay_to(path: Path) -> AsyncIterator[int]:
    """A loopback port that leads to a unix socket."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(path))
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def test_enroll(controller: RunningController, tmp_path: Path) -> None:
    root = controller.paths.controller_state / "root-ca.pem"
    done = scan(tmp_path, f"https://127.0.0.1:{controller.enroll_port}", "--tls-verify", str(root))
    assert done.returncode == 0, done.stdout + done.stderr


def test_operator(controller: RunningController, tmp_path: Path) -> None:
    async def go() -> subprocess.CompletedProcess[str]:
        async with relay_to(controller.paths.controller_socket) as port:
            return await asyncio.to_thread(scan, tmp_path, f"http://127.0.0.1:{port}", settings=NO_WAITING)

    done = asyncio.run(go())
    assert done.returncode == 0, done.stdout + done.stderr


def test_channel(controller: RunningController, tmp_path: Path) -> None:
    async def go() -> subprocess.CompletedProcess[str]:
        async with machine() as stand:
            se = stand.se(controller.bundle, "scanned")
            await se.enroll()
            await se.link()
            way = await se.conn.forward_local_port("127.0.0.1", 0, tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            try:
                return await asyncio.to_thread(scan, tmp_path, f"http://127.0.0.1:{way.get_port()}")
            finally:
                way.close()

    done = asyncio.run(go())
    assert done.returncode == 0, done.stdout + done.stderr
