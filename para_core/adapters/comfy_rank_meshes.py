"""ComfyUI on a rank: the meshes that its group's ranks have been arranged in."""

from __future__ import annotations

from ..attention import MeshShape, RankMesh, device_mesh
from ..workers.ports import deaf_afterwards


class RankMeshes:
    """Each is made once, by all ranks in the same call: its process groups stay."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._made: dict[MeshShape, RankMesh] = {}

    def of(self, shape: MeshShape) -> RankMesh:
        if shape not in self._made:
            with deaf_afterwards():
                alone = shape.world_size == 1
                self._made[shape] = RankMesh() if alone else RankMesh.of(device_mesh(self._device_type, shape))
        return self._made[shape]
