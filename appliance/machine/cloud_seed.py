"""cloud-init's files of the image's own seed, with a VM's wishes worked in. Bytes in, bytes out.

image-builder writes user-data as one `name: JSON` a line, and so it is read here. User-data of another form (somebody
made the seed by hand) is passed on as it is, and the wishes that would go into it are told as left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from appliance.machine import wishes as wished
from appliance.machine.wishes import Wishes
from appliance.protocol import seed as protocol

FILES = (protocol.USER_DATA_FILE, protocol.META_DATA_FILE, protocol.NETWORK_CONFIG_FILE)
HOOKS_DIRECTORY = "/etc/appliance/hooks/"
LISTEN_FILE = "/etc/ssh/sshd_config.d/20-listen.conf"
_HEAD = "#cloud-config"
_START = ["appliance", "mode", "set", "se"]


def with_wishes(files: Mapping[str, bytes], wishes: Wishes, notes: list[str]) -> dict[str, bytes]:
    """Returns the files as cloud-init shall find them.

    Args:
        files: of `FILES`, those that the image's own seed has.
        wishes: of this VM.
        notes: gets a sentence for what could not be worked in.
    """
    found = {name: content for name, content in files.items() if name in FILES}
    if protocol.USER_DATA_FILE in found:
        found[protocol.USER_DATA_FILE] = _without_start(found[protocol.USER_DATA_FILE])
    if wishes.network:
        found[protocol.NETWORK_CONFIG_FILE] = wishes.network
    if wishes.hostname and protocol.META_DATA_FILE in found:
        text = found[protocol.META_DATA_FILE].decode("utf-8", "replace")
        named = f"local-hostname: {json.dumps(wishes.hostname)}"
        found[protocol.META_DATA_FILE] = wished.LOCAL_HOSTNAME.sub(named, text).encode()
    if (wishes.hostname or wishes.operator_key) and protocol.USER_DATA_FILE in found:
        config = _config(found[protocol.USER_DATA_FILE])
        if config is None:
            notes.append("user-data wasn't written by image-builder: host name and operator's key are left out of it")
        else:
            found[protocol.USER_DATA_FILE] = _rendered(_changed(config, wishes))
    return found


def _without_start(user_data: bytes) -> bytes:
    """Takes the command out that starts the role, where no hook comes before it: first boot has done it by then."""
    config = _config(user_data)
    if config is None or has_hooks(user_data) or _START not in config.get("runcmd", []):
        return user_data
    config["runcmd"] = [command for command in config["runcmd"] if command != _START]
    return _rendered({name: value for name, value in config.items() if name != "runcmd" or value})


def _changed(config: dict[str, Any], wishes: Wishes) -> dict[str, Any]:
    if wishes.hostname:
        config |= {"hostname": wishes.hostname, "preserve_hostname": False}
    if wishes.operator_key:
        keys = config.get("ssh_authorized_keys", [])
        config["ssh_authorized_keys"] = [*dict.fromkeys([*keys, wishes.operator_key])]
        config["users"] = ["default"]
        others = [one for one in config.get("write_files", []) if one.get("path") != LISTEN_FILE]
        listen = {"path": LISTEN_FILE, "content": "# An operator's key was given: listen everywhere.\n"}
        config["write_files"] = [*others, listen]
    return config


def _config(raw: bytes) -> dict[str, Any] | None:
    if raw.decode("utf-8", "replace").partition("\n")[0] != _HEAD:
        return None
    try:
        return wished.read_lines(raw)
    except ValueError:
        return None


def _rendered(config: Mapping[str, Any]) -> bytes:
    return "\n".join([_HEAD, *(f"{name}: {json.dumps(value)}" for name, value in config.items()), ""]).encode()


def has_hooks(user_data: bytes) -> bool:
    """Whether programs of the image are to be run before the role starts; also where that can't be told."""
    config = _config(user_data)
    return config is None or HOOKS_DIRECTORY in json.dumps(config.get("write_files", []))
