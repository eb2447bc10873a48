"""How much the inputs overlap that models changed the treatment of, and how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergekit_karcher.sphere.trig import Floats
from mergekit_karcher.sphere.unit_vectors import normalised


def of_inputs(products: Floats | None, shares: Floats, without: Sequence[int]) -> dict[str, Any]:
    """`Tensor.input_overlap`, `inputs_in_use` and `inputs_of_each` of one tensor.

    Arguments:
        products: Of N models, as `Observation.input_products`.
        shares: Their weights, (N,), which sum to one; 0 for a model that has none.
        without: The places of models that do not count.

    Returns:
        All, by name; empty where no two models are known to have changed the tensor.
    """
    if products is None:
        return {}
    counted = np.isfinite(np.diagonal(products)) & (shares > 0)
    counted[list(without)] = False
    places = np.flatnonzero(counted)
    if len(places) < 2:
        return {}
    of_each = [
        min(float(1 / product), 1.0) if known else None
        for product, known in zip(np.diagonal(products), counted, strict=True)
    ]
    products, weights = products[np.ix_(places, places)], normalised(shares[places])
    lengths = np.sqrt(np.diagonal(products))
    pairs = np.tril(np.outer(weights, weights), -1)
    overlap = np.sum(pairs * products / lengths / lengths[:, None]) / pairs.sum()
    in_use = 1 / (weights @ products @ weights)
    return {
        "input_overlap": min(float(overlap), 1.0),
        "inputs_in_use": min(float(in_use), 1.0),
        "inputs_of_each": of_each,
    }
