"""What a node that works on several devices says on itself when it runs: a kind that can be said in any language."""

from __future__ import annotations

from dataclasses import dataclass

NOT_ASKED = "The ranks were not asked: another node runs the model itself."
NOTICES = {
    "one_device": "One device: the model runs as it is, without further processes.",
    "ranks": "{num_ranks} ranks: {mesh}",
    "not_asked": NOT_ASKED,
    "decoded_alone": "One device: decoded as VAE Decode does.",
    "decoded": "Decoded on {num_ranks} ranks.",
    "decoded_in_tiles": "Decoded on {num_ranks} ranks, in tiles: one of them ran out of memory.",
}
REPLACED = "Ended the processes on {devices}, which use some of the same devices."


@dataclass(frozen=True)
class ParallelNotice:
    """One of NOTICES. mesh: how the ranks share a model call, in words; empty where they do not.

    replaced: devices whose processes were ended to start these.
    """

    kind: str
    num_ranks: int = 1
    mesh: str = ""
    replaced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in NOTICES:
            raise ValueError(f'kind is "{self.kind}"; choose one of {", ".join(NOTICES)}.')

    def text(self) -> str:
        """One line in English."""
        text = NOTICES[self.kind].format(num_ranks=self.num_ranks, mesh=self.mesh)
        ended = REPLACED.format(devices=", ".join(self.replaced))
        return f"{text.removesuffix('.')}. {ended}" if self.replaced else text
