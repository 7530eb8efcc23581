import random

import pytest
import torch

from para_core.demo.prompt import encode, encode_scene
from para_core.demo.scene import random_scene


def test_one_token_for_the_background_and_each_object():
    for num_objects in (1, 2, 3):
        context, pooled = encode(random_scene(random.Random(num_objects), num_objects).prompt())
        assert context.shape == (1, 1 + num_objects, 64) and pooled.shape == (1, 64)
        assert context.dtype == pooled.dtype == torch.float32
        torch.testing.assert_close(context.square().mean(-1), torch.ones(1, 1 + num_objects))
        torch.testing.assert_close(pooled.square().mean(-1), torch.ones(1))


def test_empty_prompt_is_one_null_token_and_no_pooled():
    context, pooled = encode("  ")
    assert context.shape == (1, 1, 64) and context.any() and not pooled.any()


def test_different_scenes_have_different_codes():
    rng = random.Random(0)
    scenes = {random_scene(rng) for _ in range(300)}
    codes = {tuple(encode_scene(scene)[0].flatten().tolist()) for scene in scenes}
    assert len(codes) == len(scenes)


def test_encode_follows_the_prompt_not_its_wording():
    one, two = encode("a red circle top, on grey"), encode("RED circle TOP on gray")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="is not a scene"):
        encode("a photo of a cat")
