"""Distance from a 50-digit mean of the very same inputs."""

from __future__ import annotations

import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import BUILTIN, DTYPES, OURS, builtin, ours
from mpmath import mp, mpf
from rows import Row, row

REFERENCE = Path(__file__).parents[1] / "tests" / "reference.py"
SIZE = 64

# What a careful user of the built-in asks for.
PATIENT = {"max_iter": 999, "tol": 1e-10}


def error(
    counts: Sequence[int] = (2, 5, 10),
    radii: Sequence[float] = (1e-8, 1e-4, 0.1, 0.7, 1.4, 1.55),
) -> Iterator[Row]:
    """Ours, the built-in, and what rounding the exact mean once would leave.

    Ulp: the largest |result - exact| of an element over epsilon times sum_i |k_i W_i| there, so
    that 0.5 is correct rounding or better.
    """
    karcher = runpy.run_path(str(REFERENCE))["karcher"]
    for name, dtype in DTYPES.items():
        for count in counts:
            for radius in radii:
                group = [torch.tensor(v).to(dtype) for v in _around(count, radius)]
                factors, exact, angles, _ = karcher([t.tolist() for t in group], [1] * count)
                case = {"dtype": name, "models": count, "radius": radius}
                scales = _sums_of_magnitudes(factors, group)
                rounded = torch.tensor([float(v) for v in exact], dtype=torch.float64).to(dtype)
                for contestant, result in (
                    (OURS, ours(group)),
                    (BUILTIN, builtin(group)),
                    (f"{OURS}, patient", ours(group, **PATIENT)),
                    (f"{BUILTIN}, patient", builtin(group, **PATIENT)),
                    ("exact, rounded", rounded),
                ):
                    found = _distance(result, exact, scales)
                    found["largest_angle_rad"] = float(max(angles))
                    yield row("error", case, contestant, found)


def _around(count: int, radius: float) -> list[np.ndarray[Any, Any]]:
    """Vectors of unlike norms at that angle from one direction, which is their mean.

    Their other parts are the corners of a regular simplex and cancel: the hardest case, as the
    linear mean of the units is only cos(radius) long.
    """
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.standard_normal((SIZE, count + 1)))
    corners = (np.eye(count) - 1 / count) * np.sqrt(count / (count - 1)) @ frame[:, 1:].T
    norms = np.exp(0.3 * rng.standard_normal(count))
    units = np.cos(radius) * frame[:, 0] + np.sin(radius) * corners
    return list(norms[:, None] * units)


def _sums_of_magnitudes(factors: Sequence[mpf], group: Sequence[torch.Tensor]) -> list[mpf]:
    columns = zip(*(tensor.tolist() for tensor in group), strict=True)
    return [mp.fsum(abs(k * v) for k, v in zip(factors, column, strict=True)) for column in columns]


def _distance(
    result: torch.Tensor, exact: Sequence[mpf], scales: Sequence[mpf]
) -> dict[str, float]:
    epsilon = torch.finfo(result.dtype).eps
    values = [mpf(v) for v in result.tolist()]
    errors = [abs(v - e) / s for v, e, s in zip(values, exact, scales, strict=True)]
    p, q = ([v / mp.norm(side) for v in side] for side in (values, exact))
    difference = mp.norm([a - b for a, b in zip(p, q, strict=True)])
    total = mp.norm([a + b for a, b in zip(p, q, strict=True)])
    return {"ulp": float(max(errors) / epsilon), "rad": float(2 * mp.atan2(difference, total))}
