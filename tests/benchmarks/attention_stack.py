"""A FLUX-shaped stack of blocks whose tokens are divided among ranks, with our attention and with other libraries'."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from para_core.attention import AXES, RankMesh, balanced_lengths, context_attention, slice_of

HEADS, HEAD_DIM = 24, 128
WIDTH = HEADS * HEAD_DIM
CHECKED_TOKENS = 96  # of the small problem on which every implementation is compared with SDPA
SEED = 0

# (q, k, v) of this rank's tokens, (B, S, H, D) as the linear layer leaves them -> (B, S, H, D)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A transformer block in the proportions of FLUX's: qkv, attention, projection, MLP of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"))
        self.mlp.append(nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.projection(attention(q, k, v).flatten(2))
        return x + self.mlp(x)


@functools.cache
def blocks(num_blocks: int) -> list[Block]:
    """The same on every rank, as a checkpoint would be."""
    torch.manual_seed(SEED)
    return [Block() for _ in range(num_blocks)]


def alone(num_tokens: int) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attention


def ours(num_tokens: int, *, ring: bool) -> Attention:
    mesh = _mesh(ring)
    lengths = balanced_lengths(num_tokens, mesh.sequence.size)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = context_attention(*(x.transpose(1, 2) for x in (q, k, v)), mesh=mesh, lengths=lengths)
        return out.transpose(1, 2)

    return attention


@functools.cache
def _mesh(ring: bool) -> RankMesh:
    size = dist.get_world_size()
    shape = (1, size, 1) if ring else (1, 1, size)
    return RankMesh.of(init_device_mesh("cpu", shape, mesh_dim_names=AXES))


def of_diffusers(num_tokens: int) -> Attention:
    """diffusers' own Ulysses; its ring asks for a log-sum-exp that its native backend does not give on a CPU."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return functools.partial(dispatch_attention_fn, parallel_config=_diffusers_config())


@functools.cache
def _diffusers_config():
    from diffusers import ContextParallelConfig, ParallelConfig

    size = dist.get_world_size()
    config = ParallelConfig(ContextParallelConfig(ulysses_degree=size))
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("ring", "ulysses"))
    config.setup(dist.get_rank(), size, torch.device("cpu"), mesh=mesh)
    return config


def yunchang_ulysses(num_tokens: int) -> Attention:
    """yunchang's exchanges around the same local attention; its own local ones need CUDA."""
    from yunchang.comm.all_to_all import SeqAllToAll4D

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (SeqAllToAll4D.apply(None, x, 2, 1) for x in (q, k, v))
        return SeqAllToAll4D.apply(None, alone(num_tokens)(q, k, v), 1, 2)

    return attention


def yunchang_ring(num_tokens: int) -> Attention:
    """yunchang's ring over the CPU flash kernel, put in place of the CUDA one that it calls."""
    from yunchang.ring.ring_pytorch_attn import ring_pytorch_attn_func

    sys.modules[
        "yunchang.kernels.attention"
    ]._scaled_dot_product_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It sends keys and values as they lie in memory.
        return ring_pytorch_attn_func(q, k.contiguous(), v.contiguous(), group=dist.group.WORLD)

    return attention


IMPLEMENTATIONS: dict[str, Callable[[int], Attention]] = {
    "one": alone,
    "alone": alone,
    "ring": functools.partial(ours, ring=True),
    "ulysses": functools.partial(ours, ring=False),
    "diffusers ulysses": of_diffusers,
    "yunchang ulysses": yunchang_ulysses,
    "yunchang ring": yunchang_ring,
}


def in_turn(
    rank: int, world_size: int, *, implementations: Sequence[str], num_tokens: int, num_rounds: int, num_blocks: int
) -> dict[str, list[tuple[float, float]]]:
    """A case: CPU and wall seconds of this rank's tokens in each round, all implementations in turn in another order.

    "alone" has all tokens on each rank, "one" too, on rank 0 while the others wait. num_blocks 0: attention without
    anything around it.
    """
    torch.manual_seed(SEED + 1)
    whole = torch.randn(1, num_tokens, WIDTH if num_blocks else 3 * WIDTH)
    share = whole[:, slice_of(balanced_lengths(num_tokens, world_size), rank)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for number in range(num_rounds):
        place = number % len(implementations)  # what else the machine does comes and goes
        for name in (*implementations[place:], *implementations[:place]):
            attention = IMPLEMENTATIONS[name](num_tokens)
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            if name != "one" or rank == 0:
                _pass(whole if name in ("one", "alone") else share, attention, num_blocks)
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def _pass(x: Tensor, attention: Attention, num_blocks: int) -> None:
    if not num_blocks:
        attention(*x.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2))
    for block in blocks(num_blocks):
        x = block(x, attention)


def error(rank: int, world_size: int, *, implementation: str) -> float:
    """A case: the relative difference to SDPA over the whole of a small sequence, so that nobody is fast and wrong."""
    q, k, v = (torch.randn(1, CHECKED_TOKENS, HEADS, HEAD_DIM) for _ in range(3))
    expected = alone(CHECKED_TOKENS)(q, k, v)
    share = slice_of(balanced_lengths(CHECKED_TOKENS, world_size), rank)
    found = IMPLEMENTATIONS[implementation](CHECKED_TOKENS)(*(x[:, share] for x in (q, k, v)))
    return ((found - expected[:, share]).norm() / expected.norm()).item()


def rates(rank: int, world_size: int, *, num_tokens: int, message: int) -> dict[str, float]:
    """A case: CPU seconds of the linear layers and of attention for all tokens; of a message of so many bytes to every
    other rank, and of an empty one. All ranks at once, as they run in a divided call."""
    torch.manual_seed(SEED + 1)
    x, (block,) = torch.randn(1, num_tokens, WIDTH), blocks(1)
    q, k, v = torch.randn(1, num_tokens, 3 * WIDTH).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    return {
        "linear": _cpu_seconds(lambda: block(x, lambda q, k, v: q)),
        "attention": _cpu_seconds(lambda: alone(num_tokens)(q, k, v)),
        "message": _cpu_seconds(lambda: _exchange(rank, world_size, message), repeats=5),
        "empty message": _cpu_seconds(lambda: _exchange(rank, world_size, 4), repeats=50),
    }


def _exchange(rank: int, world_size: int, num_bytes: int) -> None:
    sizes = [0 if number == rank else num_bytes // 4 for number in range(world_size)]
    dist.all_to_all_single(torch.empty(sum(sizes)), torch.empty(sum(sizes)), sizes, sizes)


def _cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    work()
    dist.barrier()
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats
