"""Samplers for flow models over a plain velocity function, the same for every library that is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # of a latent and the scalar sigma


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Two calls a step, the second at the next sigma; the last step is Euler's."""
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        first = velocity(x, sigma)
        second = velocity(x + (following - sigma) * first, following) if following > 0 else first
        x = x + (following - sigma) * (first + second) / 2
    return x


def dpmpp_2m(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) on the clean prediction in log sigma, as ComfyUI runs it on flow models: one call a step."""
    previous, last = None, 0.0
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        clean = x - sigma * velocity(x, sigma)
        ahead, length = clean, 0.0
        if following > 0:
            length = math.log(sigma / following)
            if previous is not None:
                ahead = clean + length / (2 * last) * (clean - previous)
        ratio = following / sigma
        x = ratio * x + (1 - ratio) * ahead
        previous, last = clean, length
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


@dataclass(frozen=True)
class Schedule:
    """A sampler over num_steps steps, sigmas linear from 1 to 0."""

    sampler: str
    num_steps: int

    @property
    def num_calls(self) -> int:
        """Model calls of one run."""
        return 2 * self.num_steps - 1 if self.sampler == "heun" else self.num_steps

    @property
    def sigmas(self) -> Tensor:
        return torch.linspace(1, 0, self.num_steps + 1)

    def sample(self, velocity: Velocity, x: Tensor) -> Tensor:
        return SAMPLERS[self.sampler](velocity, x, self.sigmas)

    def __str__(self) -> str:
        return f"{self.sampler}, {self.num_steps} steps"
