"""Turns a prompt into FLUX conditioning by a fixed code: one token for the background, one for each object."""

import torch

from .scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, SceneObject

CODE_DIM = 64

_SEGMENTS = {
    "kind": ("null", "background", "object"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "row": ("0", "1", "2"),
    "column": ("0", "1", "2"),
    "place": PLACES,
}
_INDEX = {pair: i for i, pair in enumerate((name, value) for name, values in _SEGMENTS.items() for value in values)}


def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the context (1, 1 + num_objects, 64) and the pooled vector (1, 64) of a prompt, both float32.

    The empty prompt is the unconditional one: a single null token and a pooled vector of zeros.
    Raises: ValueError when the prompt is not a scene.
    """
    if not prompt.strip():
        return _token(kind="null")[None, None], torch.zeros(1, CODE_DIM)
    return encode_scene(Scene.parse(prompt))


def encode_scene(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `encode` returns for the scene's prompt, without parsing it."""
    tokens = [_token(kind="background", background=scene.background), *map(_object_token, scene.objects)]
    context = torch.stack(tokens)
    pooled = context.sum(0)
    return context[None], (pooled * CODE_DIM**0.5 / pooled.norm())[None]


def _object_token(item: SceneObject) -> torch.Tensor:
    row, column = divmod(PLACES.index(item.place), 3)
    return _token(
        kind="object", shape=item.shape, colour=item.colour, row=str(row), column=str(column), place=item.place
    )


def _token(**values: str) -> torch.Tensor:
    # one-hot in each named segment, scaled to unit root mean square over the token
    token = torch.zeros(CODE_DIM)
    token[[_INDEX[pair] for pair in values.items()]] = (CODE_DIM / len(values)) ** 0.5
    return token
