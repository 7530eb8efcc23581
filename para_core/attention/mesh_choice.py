"""Which mesh suits a model: every shape that the settings allow, and the one with the least communication."""

from __future__ import annotations

from dataclasses import dataclass

from .mesh import MeshShape, divisors


@dataclass(frozen=True)
class MeshRequest:
    """What the user asks of the mesh; 0 and None leave it to `choose_mesh`.

    batch_parallel: whether rows of the batch (conditionings, pictures) go to different ranks; None: where they divide.
    """

    ring_degree: int = 0
    ulysses_degree: int = 0
    batch_parallel: bool | None = None

    def __post_init__(self) -> None:
        for name in ("ring_degree", "ulysses_degree"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; allowed are whole numbers from 0. Use 0 to have it chosen."
                )


def rows_divide(num_rows: int, num_conditionings: int, num_shares: int) -> bool:
    """Whether rows of equally many a conditioning, in order, go into equal shares of which none has a part of one
    conditioning and more of another."""
    each, share = num_rows // num_conditionings, num_rows // num_shares
    return num_rows % num_shares == 0 and (each % share == 0 or share % each == 0)


def choose_mesh(
    world_size: int,
    *,
    num_heads: int,
    num_rows: int = 1,
    num_conditionings: int = 1,
    request: MeshRequest | None = None,
) -> MeshShape:
    """The mesh for attention with num_heads query heads over the num_rows rows of a batch, of so many conditionings.

    Rows apart cost no communication, so batch is as large as the rows divide; then Ulysses is as large as the heads
    divide (two all-to-all a layer, and the host's own attention), and ring takes what is left.
    Raises ValueError where the request has no such mesh.
    """
    request = request or MeshRequest()
    _refuse_impossible(world_size, num_heads, num_rows, request)
    shapes = [
        MeshShape(batch, ring, world_size // batch // ring)
        for batch in divisors(world_size)
        if rows_divide(num_rows, num_conditionings, batch)
        for ring in divisors(world_size // batch)
    ]
    fitting = [shape for shape in shapes if _fits(shape, num_heads, request)]
    if not fitting:
        raise ValueError(
            f"{_asked(request)} does not arrange {world_size} ranks for {num_heads} heads and {num_rows} rows; "
            f"allowed are {', '.join(str(shape) for shape in shapes if _fits(shape, num_heads))}. "
            "Use one of these degrees, or 0 to have them chosen."
        )
    return max(fitting, key=lambda shape: (shape.batch, shape.ulysses))


def _fits(shape: MeshShape, num_heads: int, request: MeshRequest | None = None) -> bool:
    request = request or MeshRequest()
    return (
        num_heads % shape.ulysses == 0
        and request.ring_degree in (0, shape.ring)
        and request.ulysses_degree in (0, shape.ulysses)
        and (request.batch_parallel is None or request.batch_parallel == (shape.batch > 1))
    )


def _refuse_impossible(world_size: int, num_heads: int, num_rows: int, request: MeshRequest) -> None:
    """The two refusals that have a reason of their own to give."""
    if request.ulysses_degree and num_heads % request.ulysses_degree:
        allowed = ", ".join(str(size) for size in divisors(num_heads) if world_size % size == 0)
        raise ValueError(
            f"ulysses_degree {request.ulysses_degree} does not divide the model's {num_heads} heads; allowed on "
            f"{world_size} ranks are {allowed}. Use one of these, 0 to have it chosen, or a ring_degree instead."
        )
    if request.batch_parallel and not any(num_rows % size == 0 for size in divisors(world_size)[1:]):
        raise ValueError(
            f"batch_parallel is on, but {num_rows} row(s) a call do not divide among {world_size} ranks; needed are "
            "several rows (cfg above 1 with prompts of one length, or a batch). Leave it on auto, or switch it off."
        )


def _asked(request: MeshRequest) -> str:
    asked = {
        "ring_degree": request.ring_degree,
        "ulysses_degree": request.ulysses_degree,
        "batch_parallel": request.batch_parallel,
    }
    return ", ".join(f"{name} {value}" for name, value in asked.items() if value not in (0, None) or value is False)
