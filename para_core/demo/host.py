"""A ComfyUI process of our own: found, started with this pack in clean folders, given workflows, and ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .host_messages import HostError, Listener, refusal, until_end
from .workflow import to_api

logger = logging.getLogger(__name__)

PACK = Path(__file__).absolute().parents[2]
HOW_TO_GET_ONE = (
    "no ComfyUI found: set COMFYUI_PATH to a checkout, or get one with `comfy install` (pip install comfy-cli)"
)
CPU_ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention")
LOAD_ERRORS = re.compile(r"IMPORT FAILED|Cannot import|Error while calling")


@dataclass(frozen=True)
class HostRun:
    """One finished workflow.

    outputs: node id to what the node showed; images: the files it saved (previews are not among them), which live as
        long as the server's folders.
    events: (type, data) of every message in order, progress texts as ("progress_text", {"node", "text"}).
    seconds: from queueing to the end of the execution.
    """

    outputs: dict[str, dict]
    images: tuple[Path, ...]
    events: tuple[tuple[str, dict], ...]
    seconds: float

    def events_of(self, type_: str) -> list[dict]:
        """The data of all events of one type, in order."""
        return [data for name, data in self.events if name == type_]


def find_comfyui() -> Path | None:
    """The ComfyUI checkout to use: $COMFYUI_PATH, else the one the pack sits in, else comfy-cli's default workspace."""
    if chosen := os.environ.get("COMFYUI_PATH"):
        if not (Path(chosen) / "main.py").is_file():
            raise ValueError(f'COMFYUI_PATH is "{chosen}", where there is no main.py; set it to a ComfyUI checkout')
        return Path(chosen).absolute()
    around = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    places = [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((place for place in places if (place / "main.py").is_file()), None)


class ComfyServer:
    """A server process that sees this pack and no other; use it as a context manager.

    base_directory: holds its models, inputs, outputs and settings; by default a temporary one, removed at the end.
    The process runs in this Python, listens on this machine only and ends with all its children.
    """

    def __init__(
        self, comfyui: Path, *, base_directory: Path | None = None, arguments: Sequence[str] = CPU_ARGUMENTS
    ) -> None:
        self.comfyui = comfyui
        self.arguments = tuple(arguments)
        self._temporary = base_directory is None
        self.base_directory = base_directory or Path(tempfile.mkdtemp(prefix="para-comfyui-"))
        self.log_file = self.base_directory / "comfyui.log"
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen | None = None
        self._object_info: dict | None = None

    def __enter__(self) -> ComfyServer:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process and its children; may be called twice."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        if self._temporary:
            shutil.rmtree(self.base_directory, ignore_errors=True)

    def log(self) -> str:
        """What the server has written so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def object_info(self) -> dict:
        """The server's description of all nodes; asked once."""
        if self._object_info is None:
            self._object_info = self.request("/object_info")
        return self._object_info

    def free(self) -> None:
        """Make the server forget models and cached results, so that the next run computes everything."""
        self.request("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.3)  # it frees when it next looks at its queue, and does not say that it has

    def request(self, path: str, body: dict | None = None) -> dict | None:
        """One HTTP exchange, JSON both ways; with a body it is a POST. Raises HostError with the server's words."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise HostError(refusal(error.read(), error)) from None
        return json.loads(text) if text else None

    def run_workflow(self, workflow: dict, *, timeout: float = 600, listener: Listener | None = None) -> HostRun:
        """Queue a workflow, in the interface's format or the API's, and wait for its end.

        listener: called with type and data of each message when it comes, by another thread.
        Raises HostError with the failing node and its message, or when `timeout` seconds have passed.
        """
        prompt = to_api(workflow, self.object_info())
        # A thread: the caller may sit in an event loop of its own.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self._run(prompt, timeout, listener)).result()

    async def _run(self, prompt: dict, timeout: float, listener: Listener | None) -> HostRun:
        import aiohttp  # comes with ComfyUI's requirements

        client = uuid.uuid4().hex
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as messages:
            start = time.perf_counter()
            answer = await asyncio.to_thread(self.request, "/prompt", {"prompt": prompt, "client_id": client})
            try:
                events = await asyncio.wait_for(until_end(messages, answer["prompt_id"], listener), timeout)
            except asyncio.TimeoutError:
                raise HostError(f"the workflow did not end within {timeout:g} s") from None
        outputs = {data["node"]: data["output"] for type_, data in events if type_ == "executed" and data["output"]}
        shown = [entry for output in outputs.values() for entry in output.get("images", ())]
        files = [entry for entry in shown if entry["type"] == "output"]
        images = tuple(self.base_directory / file["type"] / file["subfolder"] / file["filename"] for file in files)
        return HostRun(outputs, images, tuple(events), time.perf_counter() - start)

    def _start(self) -> None:
        custom_nodes = self.base_directory / "custom_nodes"
        for folder in (custom_nodes, *(self.base_directory / name for name in ("models", "input", "output", "temp"))):
            folder.mkdir(parents=True, exist_ok=True)
        link = custom_nodes / "para-accelerate"
        if not link.is_symlink():
            link.symlink_to(PACK, target_is_directory=True)
        where = ("--port", self.url.rpartition(":")[2], "--base-directory", str(self.base_directory))
        database = ("--database-url", f"sqlite:///{self.base_directory / 'comfy.db'}")
        command = [sys.executable, "main.py", "--disable-auto-launch", "--disable-api-nodes", *where, *database]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=self.comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self, timeout: float = 300) -> None:
        start = time.monotonic()
        while True:
            try:
                self.request("/system_stats")
                break
            except (HostError, OSError):
                if self._process.poll() is not None or time.monotonic() - start > timeout:
                    tail = "\n".join(self.log().splitlines()[-15:])
                    raise HostError(f"ComfyUI at {self.comfyui} did not start; its last words:\n{tail}") from None
            time.sleep(0.2)
        if failed := [line for line in self.log().splitlines() if LOAD_ERRORS.search(line)]:
            raise HostError(f"ComfyUI could not load the pack: {failed[0]}")
        logger.info("ComfyUI ready at %s after %.1f s", self.url, time.monotonic() - start)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{find_comfyui() or ''}\n")
    except ValueError as error:
        sys.exit(str(error))
