"""Reports as numbers, to be held against plain sums over the weights."""

from __future__ import annotations

import numpy as np
from conftest import weights_of
from wide import angle

from mergekit_karcher.report.schema import Report


def report_of(result):
    assert result.exit_code == 0, result.output
    return Report.model_validate_json(result.stdout)


def vectors_of(models, name):
    return [weights_of(model)[name].double().numpy().ravel() for model in models]


def close(values, expected, **tolerance):
    """Nested lists with None for NaN."""
    array = np.array(values, dtype=float)
    np.testing.assert_allclose(array, np.array(expected, dtype=float), **tolerance)


def pairwise(vectors):
    return [[angle(p, q) for q in vectors] for p in vectors]
