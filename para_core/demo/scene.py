"""A scene: one to three coloured shapes on a plain background, the whole world of the demo model."""

import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (222, 32, 40),
    "orange": (250, 138, 20),
    "yellow": (250, 226, 44),
    "green": (28, 160, 62),
    "cyan": (40, 205, 222),
    "blue": (40, 76, 226),
    "purple": (156, 44, 190),
}
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "beige": (226, 214, 190),
    "navy": (28, 34, 76),
    "brown": (96, 70, 52),
    "black": (20, 20, 22),
}
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MAX_OBJECTS = 3
EXAMPLE_PROMPT = "a red circle top left, a blue square bottom right, on grey"

_ALIASES = {"middle": "centre", "top centre": "top", "bottom centre": "bottom", "centre left": "left"}
_ALIASES |= {"centre right": "right", "centre centre": "centre"}
_HELD_OUT_SHARE = 16  # one prompt of 16 is never trained on


@dataclass(frozen=True)
class SceneObject:
    """One shape of one colour at one place of the 3x3 grid."""

    shape: str
    colour: str
    place: str

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES)
        _require("colour", self.colour, COLOURS)
        _require("place", self.place, PLACES)


@dataclass(frozen=True)
class Scene:
    """A background and 1 to 3 objects at different places; objects are kept in reading order."""

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        _require("background", self.background, BACKGROUNDS)
        places = {item.place for item in self.objects}
        if not 1 <= len(self.objects) <= MAX_OBJECTS or len(places) != len(self.objects):
            raise ValueError(
                f"{len(self.objects)} objects at {len(places)} places; a scene holds 1 to {MAX_OBJECTS} objects, "
                f'each at its own place; try "{EXAMPLE_PROMPT}"'
            )
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda item: PLACES.index(item.place))))

    @classmethod
    def parse(cls, prompt: str) -> "Scene":
        """Read a prompt such as "a red circle top left, on grey"; case, spaces and articles do not matter.

        Raises: ValueError for anything that is not a scene.
        """
        try:
            return cls(*_read(prompt.lower()))
        except ValueError as error:
            raise ValueError(_parse_message(prompt, error)) from None

    def prompt(self) -> str:
        """Return the canonical prompt; `Scene.parse` reads it back to an equal scene."""
        phrases = [f"{_article(item.colour)} {item.colour} {item.shape} {item.place}" for item in self.objects]
        return ", ".join([*phrases, f"on {self.background}"])

    def held_out(self) -> bool:
        """Tell whether this scene is kept out of training, by a hash of its prompt."""
        return hashlib.sha256(self.prompt().encode()).digest()[0] % _HELD_OUT_SHARE == 0

    def draw(self, rng: random.Random | None = None) -> Image.Image:
        """Draw a 128x128 RGB image; an rng shifts, sizes, turns and tints the shapes a little."""
        scale = 4
        canvas = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, _tint(BACKGROUNDS[self.background], rng))
        pen = ImageDraw.Draw(canvas)
        for item in self.objects:
            x, y = place_centre(item.place)
            x, y = x + _jitter(rng, 2.0), y + _jitter(rng, 2.0)
            points = _outline(item.shape, 15.5 + _jitter(rng, 1.2), math.radians(_jitter(rng, 5.0)))
            pen.polygon([((x + u) * scale, (y + v) * scale) for u, v in points], fill=_tint(COLOURS[item.colour], rng))
        return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def place_centre(place: str) -> tuple[float, float]:
    """Return the (x, y) pixel centre of a place."""
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) * IMAGE_SIZE / 3, (row + 0.5) * IMAGE_SIZE / 3


def random_scene(rng: random.Random, num_objects: int | None = None) -> Scene:
    """Draw a scene at random, of 1 to 3 objects unless `num_objects` says how many; may be a held-out one."""
    num_objects = num_objects or rng.randint(1, MAX_OBJECTS)
    colours, places = tuple(COLOURS), rng.sample(PLACES, min(num_objects, len(PLACES)))
    objects = tuple(SceneObject(rng.choice(SHAPES), rng.choice(colours), place) for place in places)
    return Scene(rng.choice(tuple(BACKGROUNDS)), objects)


def training_scenes(seed: int) -> Iterator[Scene]:
    """Yield random scenes without end, none of them held out."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if not scene.held_out():
            yield scene


def held_out_prompts(n: int, seed: int = 0) -> list[str]:
    """Return `n` different prompts the model never saw in training."""
    rng, prompts = random.Random(seed), {}
    while len(prompts) < n:
        scene = random_scene(rng)
        if scene.held_out():
            prompts[scene.prompt()] = None
    return list(prompts)


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as (H, W, 3) float32 in 0..1; takes PIL, uint8 or 0..1 float."""
    array = np.asarray(image)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)


def _outline(shape: str, radius: float, angle: float) -> list[tuple[float, float]]:
    r, s, t = radius, radius * 0.88, radius * 0.34
    points = {
        "circle": [(r * math.cos(k * math.pi / 32), r * math.sin(k * math.pi / 32)) for k in range(64)],
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -1.05 * r), (1.05 * r, 0.85 * r), (-1.05 * r, 0.85 * r)],
        "cross": [turn for arm in range(4) for turn in _quarter_turns([(-t, -t), (-t, -r), (t, -r)], arm)],
    }[shape]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(u * cos - v * sin, u * sin + v * cos) for u, v in points]


def _quarter_turns(points: list[tuple[float, float]], times: int) -> list[tuple[float, float]]:
    for _ in range(times):
        points = [(-v, u) for u, v in points]
    return points


def _jitter(rng: random.Random | None, width: float) -> float:
    return rng.uniform(-width, width) if rng else 0.0


def _tint(colour: tuple[int, int, int], rng: random.Random | None) -> tuple[int, ...]:
    return tuple(max(0, min(255, round(value + _jitter(rng, 5.0)))) for value in colour)


def _read(prompt: str) -> tuple[str, tuple[SceneObject, ...]]:
    match = re.fullmatch(r"(.*)\bon\b(.*)", prompt, re.DOTALL)
    if not match:
        raise ValueError('no "on <background>" at the end')
    phrases = [words for words in map(_words, re.split(r",|\band\b", match[1])) if words]
    return " ".join(_words(match[2])), tuple(SceneObject(*_split_phrase(words)) for words in phrases)


def _words(phrase: str) -> list[str]:
    words = phrase.replace("center", "centre").replace("gray", "grey").replace("-", " ").split()
    return [word for word in words if word not in ("a", "an", "the", "at", "in", "background")]


def _split_phrase(words: list[str]) -> tuple[str, str, str]:
    if len(words) < 3:
        raise ValueError(f'"{" ".join(words)}" is not "colour shape place"')
    place = " ".join(words[2:])
    return words[1], words[0], _ALIASES.get(place, place)


def _require(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f'{name} "{value}" is not one of {", ".join(allowed)}')


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _parse_message(prompt: str, error: ValueError) -> str:
    return (
        f'prompt "{prompt}" is not a scene: {error}; write 1 to {MAX_OBJECTS} phrases "colour shape place" and '
        f'"on background", for example "{EXAMPLE_PROMPT}"\n'
        f"colours: {', '.join(COLOURS)}\nshapes: {', '.join(SHAPES)}\nplaces: {', '.join(PLACES)}\n"
        f"backgrounds: {', '.join(BACKGROUNDS)}"
    )
