"""Reads a scene back from an image by plain colour and template matching, and scores it against a prompt's."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, SHAPES, Scene, SceneObject, place_centre, to_array

_MIN_CONTRAST = 0.14  # of a pixel against the background, root mean square over the channels
_MIN_AREA = 150  # pixels; the smallest drawn shape covers about 400
_MIN_OVERLAP = 0.6  # of a mask with the best template; a blob is no shape
_TEMPLATE_SIZE = 32


@dataclass(frozen=True)
class Reading:
    """What an image shows: the nearest background, and at most one shape for each place.

    `background` is None when the border's colour is near none; an object's shape or colour is None likewise.
    """

    background: str | None
    objects: dict[str, tuple[str | None, str | None]]


def read_image(image: Image.Image | np.ndarray) -> Reading:
    """Read background, shapes, colours and places from a 128x128 image: PIL, or (H, W, 3) uint8 or 0..1 float.

    Raises: ValueError for another size.
    """
    pixels = to_array(image)
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"image of shape {pixels.shape}; the checker reads ({IMAGE_SIZE}, {IMAGE_SIZE}, 3) only")
    background = _background_colour(pixels)
    objects = {}
    for place in PLACES:
        window = _window(pixels, place)
        mask = _rms(window - background) > _MIN_CONTRAST
        if mask.sum() >= _MIN_AREA:
            objects[place] = (_read_shape(mask), _nearest(_colour(window, mask), COLOURS))
    return Reading(_nearest(background, BACKGROUNDS), objects)


def attribute_accuracy(scene: Scene, image: Image.Image | np.ndarray) -> float:
    """Return the share of the scene's attributes that the image shows, 0 to 1.

    The attributes are the background and, of each object, its presence, shape and colour; each object where
    the scene has none counts as one more attribute that is wrong.
    """
    reading = read_image(image)
    right = [reading.background == scene.background]
    for item in scene.objects:
        shape, colour = reading.objects.get(item.place, (None, None))
        right += [item.place in reading.objects, shape == item.shape, colour == item.colour]
    spurious = reading.objects.keys() - {item.place for item in scene.objects}
    return sum(right) / (len(right) + len(spurious))


def _background_colour(pixels: np.ndarray) -> np.ndarray:
    # three shapes cover at most a fifth of the image, so the median is plain background
    return np.median(pixels.reshape(-1, 3), axis=0)


def _window(pixels: np.ndarray, place: str) -> np.ndarray:
    x, y = place_centre(place)
    half = IMAGE_SIZE / 6
    return pixels[round(y - half) : round(y + half), round(x - half) : round(x + half)]


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt((difference**2).mean(-1))


def _colour(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # the median of the mask is inside the shape, away from soft edges
    return np.median(window[mask], axis=0)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(_rms(colour - np.array(value) / 255)) for name, value in palette.items()}
    best = min(distances, key=distances.get)
    return best if distances[best] < 0.15 else None


def _read_shape(mask: np.ndarray) -> str | None:
    crop = _normalise(mask)
    overlaps = {}
    for shape, template in _templates():
        overlap = (crop & template).sum() / (crop | template).sum()
        overlaps[shape] = max(overlap, overlaps.get(shape, 0.0))
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] > _MIN_OVERLAP else None


def _normalise(mask: np.ndarray) -> np.ndarray:
    """Cut a mask to the shape's own box and scale the box to the templates' size."""
    rows, columns = (np.flatnonzero(mask.sum(dim) > 1) for dim in (1, 0))
    if not len(rows) or not len(columns):
        return np.zeros((_TEMPLATE_SIZE, _TEMPLATE_SIZE), bool)
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(crop.astype(np.uint8) * 255)
    return np.asarray(image.resize((_TEMPLATE_SIZE, _TEMPLATE_SIZE), Image.Resampling.BILINEAR)) > 127


@cache
def _templates() -> tuple[tuple[str, np.ndarray], ...]:
    return tuple(_draw_templates())


def _draw_templates() -> Iterator[tuple[str, np.ndarray]]:
    for shape in SHAPES:
        drawn = to_array(Scene("black", (SceneObject(shape, "yellow", "centre"),)).draw())
        for degrees in (-5, 0, 5):
            turned = to_array(Image.fromarray(np.uint8(drawn * 255)).rotate(degrees, Image.Resampling.BILINEAR))
            yield shape, _normalise(_window(turned, "centre")[..., 0] > 0.5)
