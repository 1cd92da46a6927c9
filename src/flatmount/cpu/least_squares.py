"""Non-linear least squares for a handful of parameters, without numpy: Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_STEP = 1e-5
_ROUNDS = 200
_LONGEST_STEP = 2.0


def fit(residuals: Callable[[Sequence[float]], list[float]], start: Sequence[float]) -> tuple[float, ...]:
    """The parameters near `start` for which the squares of `residuals` add up to the least."""
    place = list(start)
    here = residuals(place)
    best = _squares(here)
    damping = 1e-2
    for _ in range(_ROUNDS):
        step = _step(residuals, place, here, damping)
        tried = [a + max(-_LONGEST_STEP, min(_LONGEST_STEP, b)) for a, b in zip(place, step, strict=True)]
        there = residuals(tried)
        total = _squares(there)
        if total < best:
            done = best - total < 1e-14 * (1 + best)
            place, here, best, damping = tried, there, total, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return tuple(place)


def _squares(values: Sequence[float]) -> float:
    return sum(value * value for value in values)


def _step(
    residuals: Callable[[Sequence[float]], list[float]], place: list[float], here: list[float], damping: float
) -> list[float]:
    slopes = []
    for i in range(len(place)):
        moved = list(place)
        moved[i] += _STEP
        slopes.append([(b - a) / _STEP for a, b in zip(here, residuals(moved), strict=True)])
    matrix = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in slopes] for a in slopes]
    for i, row in enumerate(matrix):
        row[i] += damping * (row[i] + 1e-9)
    return solve(matrix, [-sum(x * y for x, y in zip(a, here, strict=True)) for a in slopes])


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The solution of a square linear system, by elimination with pivots. Raises: ZeroDivisionError where none is."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            for c in range(i, size + 1):
                rows[r][c] -= factor * rows[i][c]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][c] * solution[c] for c in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line through points of two or more different x."""
    n = len(points)
    mean_x = sum(x for x, _ in points) / n
    mean_y = sum(y for _, y in points) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope
