"""The loops that ranks run once they are joined: rank 0 serves the client and leads, the others follow."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path

import torch

from .call_watch import CallWatch, Verdict
from .calls import Memories, Rounds
from .channel import GIVE_UP, Connection, ConnectionLost, Listener
from .config import GroupConfig, WorkerContext
from .protocol import Message, Payload, as_it_lies, decode
from .root_store import Root
from .shared_memory import Answers, ReceivedBuffer, SharedMemory
from .stacks import StackTeller
from .status import ABANDONED, Status, formatted, is_harmless, usable


class Performer:
    """Runs a method of the service on a received message; the same on every rank."""

    def __init__(self, context: WorkerContext, service: object, root: Root, config: GroupConfig) -> None:
        self.context = context
        self.service = service
        self.inbox = ReceivedBuffer()
        self._root = root  # on rank 0 it is the server of every store here
        control = root.control()
        self.rounds = Rounds(control, context.rank, context.world_size)
        self.memories = Memories(context.rank, self.inbox)
        self.memories.agree(control, context.world_size, config.process_group_timeout)
        control.set(f"ready/{context.rank}", json.dumps({"pid": os.getpid(), "device": str(context.device)}))
        self.peers = [json.loads(control.get(f"ready/{rank}")) for rank in range(context.world_size)]

    def perform(self, method: str, message: torch.Tensor, shared: list[torch.Tensor]) -> Payload:
        device = self.context.device
        if self.borrows(method):
            own = as_it_lies
        else:
            own = torch.clone if device.type == "cpu" else lambda piece: piece.to(device)
        payload = decode(message, shared, own=own)
        if method.startswith("_") or not callable(function := getattr(self.service, method, None)):
            raise AttributeError(f"{type(self.service).__name__} has no method {method!r} to call")
        result = function(payload)
        if device.type == "cuda":  # what fails, or hangs in a collective, does so in this call and not in a later one
            torch.cuda.synchronize(device)
        return result

    def borrows(self, method: str) -> bool:
        """Whether the method gets views of the message instead of copies: it keeps none of them when it returns."""
        return self.context.device.type == "cpu" and method in getattr(self.service, "borrowing", ())

    def failed(self, call: int, error: BaseException) -> Status:
        device, harmless = self.context.device, is_harmless(error, self.context.device.type)
        text = formatted(error)
        self.rounds.fail(call, text)
        if device.type == "cuda" and harmless:
            harmless = _settled(device)
        return Status.now(self.context.rank, device, text, harmless=harmless)


def _settled(device: torch.device) -> bool:
    """Whether what is under way there ends well; what nobody uses is given back, for it may have been out of memory."""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


class Follower(Performer):
    def __init__(self, context: WorkerContext, service: object, root: Root, config: GroupConfig) -> None:
        super().__init__(context, service, root, config)
        StackTeller(root.control(), context.rank)

    @torch.inference_mode()
    def run(self) -> None:
        call = 0
        while True:
            order = self.rounds.await_order(call)
            self.rounds.finish(call, self._follow(call, order))
            call += 1

    def _follow(self, call: int, order: dict) -> Status:
        try:
            received = self.memories.receive(order, private=self.borrows(order["method"]))
            self.perform(order["method"], *received)
        except BaseException as error:
            return self.failed(call, error)
        finally:
            self.inbox.settle()
        return Status.now(self.context.rank, self.context.device)


class Leader(Performer):
    def __init__(self, context: WorkerContext, service: object, root: Root, config: GroupConfig) -> None:
        super().__init__(context, service, root, config)
        self._incarnation = secrets.token_hex(8)
        self._patience = config.collective_timeout
        self._call = 0
        self._generation = 0
        self._answers = Answers()
        self._connection: Connection | None = None
        self._watch = CallWatch(
            root.control(), context.world_size, config, given_up=self._given_up, report=self._abandon
        )

    @torch.inference_mode()
    def run(self, socket: Path, key: bytes) -> None:
        listener = Listener(socket, key, one_at_a_time=True)
        hello = {"incarnation": self._incarnation, "ranks": self.peers, "collective_timeout": self._patience}
        hello["restarts"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        while True:
            self._connection = listener.accept()
            try:
                self._connection.send(hello)
                self.inbox.close()
                self._answers.close()
                while True:
                    self._serve(*self._connection.receive())
            except ConnectionLost:
                self._connection.close()

    def _serve(self, request: dict, descriptors: list[int]) -> None:
        if request == GIVE_UP:  # it came beside the answer; the client counts on new ranks
            os._exit(ABANDONED)
        shared = self._taken(request, descriptors)
        order = {"method": request["method"], "size": request["size"], "pid": os.getpid()}
        order["inbox"] = [self.inbox.memory.descriptor, self.inbox.memory.size, self._generation]
        order["shared"] = [[block.descriptor, block.size] for block in shared]
        self._watch.begin(self._call)
        self.rounds.announce(self._call, order)
        answer, status = self._lead(request, shared)
        self.rounds.finish(self._call, status)
        statuses = self.rounds.statuses(self._call)
        self._watch.end()
        self.rounds.forget(self._call)
        for block in shared:
            block.close()
        self.inbox.settle()
        try:
            self._answer(answer, statuses, request["lent"])
        finally:
            self._answers.settle()
            self._call += 1

    def _taken(self, request: dict, descriptors: list[int]) -> list[SharedMemory]:
        """The request's memory, with the descriptors taken over."""
        sizes = [*([request["buffer"]] if request["buffer"] else []), *request["shared"]]
        if len(sizes) != len(descriptors):
            raise ConnectionLost(f"{len(descriptors)} descriptors came for {len(sizes)} blocks")
        memories = [SharedMemory.received(*pair) for pair in zip(descriptors, sizes, strict=True)]
        if request["buffer"]:
            self.inbox.replace(memories.pop(0))
            self._generation += 1
        return memories

    def _lead(self, request: dict, shared: list[SharedMemory]) -> tuple[Message | None, Status]:
        context = self.context
        try:
            self.memories.send(request["size"], shared)
            blocks = [block.mapped(private=True) for block in shared]
            private = self.borrows(request["method"])
            result = self.perform(request["method"], self.inbox.message(request["size"], private=private), blocks)
            message = Message(result)
            if message.shared:
                raise ValueError(f"{request['method']} returned Shared, which travels to the ranks only")
            return message, Status.now(context.rank, context.device)
        except BaseException as error:
            return None, self.failed(self._call, error)

    def _answer(self, message: Message | None, statuses: list[Status], lent: list[int]) -> None:
        memory_bytes = [status.memory_bytes for status in statuses]
        if any(status.error for status in statuses):
            leaving = not usable(statuses, self.context.device.type)
            rank, error = self.rounds.first_failure(self._call)
            frame = {"ok": False, "rank": rank, "error": error, "memory": memory_bytes, "leaving": leaving}
            try:
                self._connection.send(frame)
            finally:  # also where the client is gone
                if leaving:
                    os._exit(ABANDONED)
            return
        number, buffer, memory = self._answers.reserve(message.size, lent)
        message.write(buffer)
        frame = {"ok": True, "size": message.size, "memory": memory_bytes, "answer": number}
        frame["buffer"] = memory.size if memory else 0
        self._connection.send(frame, [memory.descriptor] if memory else None)

    def _given_up(self) -> bool:
        """In a call a client sends nothing but GIVE_UP; of one that is gone the ranks finish the call."""
        return not self._connection.hung_up and self._connection.poll(0)

    def _abandon(self, verdict: Verdict) -> None:
        # The client may be gone; this process ends in any case.
        with contextlib.suppress(ConnectionLost):
            self._connection.send({"ok": False, "memory": [], "leaving": True} | asdict(verdict))
