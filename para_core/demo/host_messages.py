"""What a ComfyUI server says: the messages of a prompt until its end, and why it refuses one."""

from __future__ import annotations

import json
import struct
import urllib.error
from collections.abc import Callable

TEXT_EVENT = 3  # protocol.BinaryEventTypes.TEXT
Listener = Callable[[str, dict], None]


class HostError(Exception):
    """The host did not start, refused a workflow, or failed while running it; the message is one line for a user."""


async def until_end(messages, prompt_id: str, listener: Listener | None) -> list[tuple[str, dict]]:
    """The server's messages up to the end of one prompt. Raises HostError where the prompt ends badly."""
    events = []
    async for message in messages:
        event = _binary_event(message.data) if isinstance(message.data, bytes) else json.loads(message.data)
        type_, data = event["type"], event["data"]
        events.append((type_, data))
        if listener is not None:
            listener(type_, data)
        if isinstance(data, dict) and data.get("prompt_id") == prompt_id:
            if type_ == "execution_success":
                return events
            if type_ == "execution_error":
                raise HostError(f"{data['node_type']}: {data['exception_message'].strip()}")
            if type_ == "execution_interrupted":
                raise HostError(f"interrupted at {data['node_type']}")
    raise HostError("the server ended while the workflow was running")


def _binary_event(message: bytes) -> dict:
    """A text on a node, or a preview, of which only the size is kept."""
    kind, length = struct.unpack_from(">II", message)
    if kind != TEXT_EVENT:
        return {"type": "preview", "data": {"num_bytes": len(message)}}
    node, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
    return {"type": "progress_text", "data": {"node": node, "text": text}}


def refusal(body: bytes, error: urllib.error.HTTPError) -> str:
    """One line from the server's answer to a prompt that it refuses: the first node's first complaint."""
    try:
        answer = json.loads(body)
        for node in (answer.get("node_errors") or {}).values():
            for complaint in node["errors"]:
                return f"{node['class_type']}: {complaint['message']} ({complaint['details']})"
        return f"{answer['error']['message']} {answer['error'].get('details', '')}".strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the server answers {error.code} {error.reason}"
