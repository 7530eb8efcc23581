import random

import numpy as np
import pytest

from para_core.demo.scene import EXAMPLE_PROMPT, Scene, SceneObject, held_out_prompts, random_scene, training_scenes

RED_CIRCLE = SceneObject("circle", "red", "top left")
BLUE_SQUARE = SceneObject("square", "blue", "centre")


def test_parse_reads_back_every_prompt():
    rng = random.Random(0)
    for scene in (random_scene(rng) for _ in range(300)):
        assert Scene.parse(scene.prompt()) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle top left, a blue square centre, on grey",
        "  A RED  circle top-left AND the blue square in the center on gray",
        "a blue square middle, a red circle at the top left, on a grey background",
    ],
)
def test_parse_takes_spelling_and_order_easily(prompt):
    assert Scene.parse(prompt) == Scene("grey", (RED_CIRCLE, BLUE_SQUARE))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "on <background>"),
        ("a photo of a cat", "on <background>"),
        ("a red circle top left", "on <background>"),
        ("on grey", "0 objects"),
        ("a red blob top, on grey", 'shape "blob" is not one of circle'),
        ("a pink circle top, on grey", 'colour "pink" is not one of red'),
        ("a red circle above, on grey", 'place "above" is not one of top left'),
        ("a red circle top, on mauve", 'background "mauve" is not one of grey'),
        ("red circle, on grey", '"red circle" is not "colour shape place"'),
        ("a red circle top, a blue circle top, on grey", "2 objects at 1 places"),
    ],
)
def test_nonsense_is_refused_in_one_line_with_an_example(prompt, reason):
    with pytest.raises(ValueError) as caught:
        Scene.parse(prompt)
    first = str(caught.value).splitlines()[0]
    assert f'"{prompt}"' in first and reason in first and EXAMPLE_PROMPT in first


def test_draw_is_fixed_without_rng_and_varies_with_one():
    scene = Scene("grey", (RED_CIRCLE, BLUE_SQUARE))
    plain, jittered = np.asarray(scene.draw()), np.asarray(scene.draw(random.Random(1)))
    assert plain.shape == (128, 128, 3)
    assert (plain == np.asarray(scene.draw())).all()
    assert (plain != jittered).any()


def test_training_never_sees_a_held_out_prompt():
    scenes = training_scenes(seed=3)
    assert not any(next(scenes).held_out() for _ in range(500))
    prompts = held_out_prompts(40, seed=3)
    assert len(set(prompts)) == 40 and all(Scene.parse(prompt).held_out() for prompt in prompts)
    assert prompts == held_out_prompts(40, seed=3)
