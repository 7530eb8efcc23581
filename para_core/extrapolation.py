"""Weights that continue a quantity over unevenly spaced steps, and how well they fit; plain floats, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

# Beyond this sum of absolute weights a polynomial through close and far points mostly multiplies noise.
MAX_AMPLIFICATION = 8.0
# Pull of a fit towards the polynomial, as a share of the mean square change between computed steps.
RIDGE = 1.0


def newton_weights(times: Sequence[float], at: float, order: int) -> list[float]:
    """Weights, summing to 1, of the values at `times` (newest first, all different) in the polynomial of at most
    `order` through the newest of them, evaluated at `at`. The order is lowered where the weights would explode.

    Newton's divided differences in the schedule's own variable, written as weights of the values (Lagrange's form).
    """
    for count in range(min(order + 1, len(times)), 0, -1):
        weights = [_basis(times[:count], number, at) for number in range(count)]
        if sum(map(abs, weights)) <= MAX_AMPLIFICATION or count == 1:
            return weights + [0.0] * (len(times) - count)
    return []


def _basis(times: Sequence[float], number: int, at: float) -> float:
    value = 1.0
    for other, time in enumerate(times):
        if other != number:
            value *= (at - time) / (times[number] - time)
    return value


def fitted_weights(weights: Sequence[float], products: Sequence[Sequence[float]]) -> list[float]:
    """The weights, still summing to 1, that best give a known value from the computed ones, held near `weights`.

    products: inner products of (value - newest, older - newest, ..., value), as `Samples.products` gives them.
    The first block's residual is known at every step; what best continues it serves for the blocks behind it.
    """
    size = len(weights) - 1
    if not size:
        return list(weights)
    ridge = RIDGE * sum(products[m][m] for m in range(1, size + 1)) / size
    matrix = [[products[m][n] + (ridge if m == n else 0.0) for n in range(1, size + 1)] for m in range(1, size + 1)]
    missing = [
        products[0][m] - sum(products[m][n] * weights[n] for n in range(1, size + 1)) for m in range(1, size + 1)
    ]
    step = _solve(matrix, missing)
    older = [weight + change for weight, change in zip(weights[1:], step, strict=True)]
    return [1.0 - sum(older), *older]


def blended(one: Sequence[float], other: Sequence[float], share: float) -> list[float]:
    """The weights that give `share` of the other's value and the rest of the one's."""
    return [a + share * (b - a) for a, b in zip(one, other, strict=True)]


def share_seen(
    one: Sequence[float], other: Sequence[float], products: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Numerator and denominator of the `share` at which the blend of two weightings comes nearest to a known value.

    products: as for `fitted_weights`. Both are parts of the same whole, so that those of several values can be added
    up; a value on which the two weightings agree adds (0, 0).
    """
    missing = [1.0, *(-weight for weight in one[1:])]
    apart = [0.0, *(b - a for a, b in zip(one[1:], other[1:], strict=True))]
    square, cross = _inner(apart, apart, products), _inner(missing, apart, products)
    whole = square + _inner(missing, missing, products)
    return (cross / whole, square / whole) if square > 0 else (0.0, 0.0)


def _inner(one: Sequence[float], other: Sequence[float], products: Sequence[Sequence[float]]) -> float:
    places = range(len(one))
    return sum(one[m] * other[n] * products[m][n] for m in places for n in places)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of one or two linear equations; zeros where they have none."""
    if len(right) == 1:
        return [right[0] / matrix[0][0]] if matrix[0][0] else [0.0]
    (a, b), (c, d) = matrix
    determinant = a * d - b * c
    if determinant <= 1e-12 * a * d:
        return [0.0, 0.0]
    return [(right[0] * d - b * right[1]) / determinant, (a * right[1] - c * right[0]) / determinant]


def relative_error(weights: Sequence[float], products: Sequence[Sequence[float]]) -> float:
    """Relative L2 distance between the weighted sum and the value that the products were taken of."""
    older = range(1, len(weights))
    square = products[0][0] - 2 * sum(weights[m] * products[0][m] for m in older)
    square += sum(weights[m] * weights[n] * products[m][n] for m in older for n in older)
    norm = products[-1][-1]
    return (max(square, 0.0) / norm) ** 0.5 if norm > 0 else 0.0
