import random

import numpy as np
import pytest
from PIL import ImageFilter

from para_core.demo.checker import attribute_accuracy, read_image
from para_core.demo.scene import Scene, random_scene


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(200)]
    return scenes, [scene.draw(rng) for scene in scenes]


def mean_accuracy(scenes, images):
    return np.mean([attribute_accuracy(scene, image) for scene, image in zip(scenes, images, strict=True)])


def test_drawn_scenes_are_read_right(drawn):
    assert mean_accuracy(*drawn) >= 0.995


def test_soft_edges_are_read_right(drawn):
    scenes, images = drawn
    assert mean_accuracy(scenes, [image.filter(ImageFilter.GaussianBlur(1.5)) for image in images]) >= 0.98


def test_float_images_read_as_uint8_ones(drawn):
    for image in drawn[1][:10]:
        assert read_image(image) == read_image(np.asarray(image, dtype=np.float32) / 255)


def test_images_of_other_scenes_score_low(drawn):
    scenes, images = drawn
    assert mean_accuracy(scenes[1:] + scenes[:1], images) < 0.25


def test_blank_and_noise_score_low(drawn):
    scenes, _ = drawn
    noise = np.random.default_rng(0).random((128, 128, 3))
    assert mean_accuracy(scenes[:20], [noise] * 20) < 0.35
    assert mean_accuracy(scenes[:20], [np.ones((128, 128, 3), np.float32)] * 20) == 0


def test_each_fault_costs_its_share():
    scene = Scene.parse("a red circle top left, a blue square centre, on grey")
    image = scene.draw()
    assert attribute_accuracy(scene, image) == 1
    assert attribute_accuracy(Scene.parse("a red circle top left, a blue square centre, on black"), image) == 6 / 7
    assert attribute_accuracy(Scene.parse("a red cross top left, a blue square centre, on grey"), image) == 6 / 7
    assert attribute_accuracy(Scene.parse("a cyan circle top left, a blue square centre, on grey"), image) == 6 / 7
    assert attribute_accuracy(Scene.parse("a red circle top left, on grey"), image) == 4 / 5  # one spurious object
    missing = Scene.parse("a red circle top left, a blue square centre, a red cross right, on grey")
    assert attribute_accuracy(missing, image) == 7 / 10


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(64, 64, 3\).*reads \(128, 128, 3\) only"):
        read_image(np.zeros((64, 64, 3), np.uint8))
