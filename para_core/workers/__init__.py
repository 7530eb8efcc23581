"""A torch.distributed group that stays up in the background, and runs a service for its client.

    config = GroupConfig(devices=("cuda:0", "cuda:1"), service="package.module:Factory", sys_path=(host_root,))
    group = WorkerGroup.start(config, cancelled=interrupted)
    group.recover = load                       # again after a restart
    group.call("load", {"weights": Shared(tensors), "names": names})
    latent = group.call("step", {"x": x, "t": t}, cancelled=interrupted)["latent"]
    group.close()

The service is Factory(WorkerContext) on every rank; call(name, payload) runs its method `name(payload)` on all of
them, in inference mode and with the default process group joined, and gives rank 0's result. Methods that the service
lists in `borrowing` get tensors that are only theirs until they return, which saves a copy. It knows no host and no
model. Parts: client (group, attached, launch) -> channel, protocol, shared_memory <- ranks (agent, rank, server, calls,
status).
"""

from .attached import attach
from .config import GroupConfig, WorkerContext
from .errors import Cancelled, WorkerError
from .group import WorkerGroup
from .protocol import Shared

__all__ = ["Cancelled", "GroupConfig", "Shared", "WorkerContext", "WorkerError", "WorkerGroup", "attach"]
