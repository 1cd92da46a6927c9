"""What came of holding the model against bursts it had not seen, as frozen values with a schema name."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flatmount.cpu.model import Model
from flatmount.cpu.noise import Disturbance
from flatmount.cpu.records import from_data, to_data
from flatmount.cpu.results import Burst, BurstFigure, Spread
from flatmount.cpu.topology import Topology
from flatmount.errors import UsageError

SCHEMA = "flatmount.cpu-validation/1"


@dataclass(frozen=True, slots=True)
class Point:
    """A held-out burst: measured, predicted, and by interpolation, in seconds. `error` is predicted/measured - 1.

    `repeated` is how far the medians of two halves of its repeats lie apart, as a fraction (None: it ran once).
    """

    burst: Burst
    measured: Spread
    predicted: float
    low: float
    high: float
    interpolated: float
    repeated: float | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured.median - 1

    @property
    def interpolation_error(self) -> float:
        return self.interpolated / self.measured.median - 1


@dataclass(frozen=True, slots=True)
class SimulatedPoint:
    """The formula beside the simulation of the same, in seconds."""

    burst: Burst
    formula: float
    simulated: float

    @property
    def error(self) -> float:
        return self.formula / self.simulated - 1


@dataclass(frozen=True, slots=True)
class Validation:
    """What came of it. Errors are fractions. `not_run` were left out for want of time."""

    version: str
    topology: Topology
    model: Model
    calibrated: tuple[BurstFigure, ...]
    points: tuple[Point, ...]
    simulated: tuple[SimulatedPoint, ...]
    not_run: tuple[Burst, ...]
    took_s: float
    disturbance: Disturbance

    @property
    def median_error(self) -> float:
        return statistics.median(abs(point.error) for point in self.points)

    @property
    def interpolation_error(self) -> float:
        return statistics.median(abs(point.interpolation_error) for point in self.points)

    @property
    def repeatability(self) -> float | None:
        """The median of what two halves of the same repeats differ by: what cannot be told from noise."""
        found = [point.repeated for point in self.points if point.repeated is not None]
        return statistics.median(found) if found else None

    @property
    def worst(self) -> Point:
        """The point that is most wrong, as a factor in either direction."""
        return max(self.points, key=lambda point: abs(math.log(point.predicted / point.measured.median)))

    def group(self, strategy: str, copies: int) -> float | None:
        """The median error of one strategy with so many copies."""
        return median_error(p for p in self.points if (p.burst.strategy, p.burst.copies) == (strategy, copies))

    def to_json(self) -> dict[str, Any]:
        """The fields of an object of the schema `flatmount.cpu-validation/1`."""
        data: dict[str, Any] = to_data(self)
        worst = self.worst
        return {
            **data,
            "median_error": self.median_error,
            "interpolation_error": self.interpolation_error,
            "repeatability": self.repeatability,
            "worst": {"burst": to_data(worst.burst), "error": worst.error},
        }


def median_error(points: Iterable[Point]) -> float | None:
    """The median of the absolute errors; None for no points."""
    errors = [abs(point.error) for point in points]
    return statistics.median(errors) if errors else None


def load_validation(path: str) -> Validation:
    """Read what `cpu model validate --output` wrote. Raises: UsageError for another schema or a damaged file."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a validation: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path} has the schema {schema!r}", hint=f"this version reads {SCHEMA}")
    return from_data(Validation, data, path)


def interpolate(burst: Burst, figures: dict[Burst, BurstFigure]) -> float:
    """Seconds by straight lines through the logarithms of its strategy's four corners, carried on beyond them."""

    def corner(containers: int, layers: int) -> float:
        return math.log(figures[Burst(burst.strategy, containers, layers, burst.copies)].wall_s.median)

    by_layers = (math.log(burst.layers) - math.log(10)) / (math.log(100) - math.log(10))
    by_containers = (math.log(burst.containers) - math.log(10)) / (math.log(50) - math.log(10))
    few = corner(10, 10) * (1 - by_layers) + corner(10, 100) * by_layers
    many = corner(50, 10) * (1 - by_layers) + corner(50, 100) * by_layers
    return math.exp(few * (1 - by_containers) + many * by_containers)
