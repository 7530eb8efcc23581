"""ComfyUI: tells the conditionings of a model call apart, and each of the passes that are made of one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

NAMES = {0: "positive", 1: "negative"}


def conditionings_of(
    model: object, x: Tensor, options: Mapping, seen: set[Hashable] | None = None
) -> dict[Hashable, str]:
    """A key for each conditioning in the batch, in row order, and the name under which it is shown.

    The same conditioning is evaluated for other purposes too: by another device's thread, for a window of the video,
    or once more by guidance that changes what the blocks do (skip-layer, perturbed attention, spatio-temporal). Each
    of these has its own residuals. The role is part of the key because for an area that one side lacks, the host makes
    a conditioning with the id of the other side's. seen: keys of the sampler's current evaluation; added to.
    """
    roles = options.get("cond_or_uncond", [0])
    uuids = options.get("uuids", roles)
    window = options.get("context_window")
    window = tuple(getattr(window, "index_list", ())) if window is not None else None
    shared = (id(model), x.device, x.shape[1:], window, _foreign(options))
    seen = set() if seen is None else seen
    keys: dict[Hashable, str] = {}
    for role, uuid in zip(roles, uuids, strict=True):
        number = 0
        while (key := (role, uuid, number, *shared)) in seen:
            number += 1
        seen.add(key)
        keys[key] = NAMES.get(role, f"conditioning {role}")
    return keys


def _foreign(options: Mapping) -> Hashable:
    """What tells this pass from another of the same conditioning: other packs' block patches and switches."""
    patches = frozenset(
        (kind, key, patch if isinstance(patch, Hashable) else id(patch))
        for kind, found in options.get("patches_replace", {}).items()
        for key, patch in found.items()
    )
    # Not numbers: they may change with every step.
    switches = frozenset((key, value) for key, value in options.items() if isinstance(value, (bool, str, frozenset)))
    return patches, switches
