"""What the plots of a report show, read from the figures and not from their pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from configs import config_for
from reports import report_of
from safetensors.torch import save_file

from mergekit_karcher.report import charts, plots


def cells_of(axes):
    (image,) = axes.images
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(kinds, np.ma.filled(image.get_array().astype(float), math.nan), strict=True))


def test_task_vectors_have_heat_maps_of_their_own(close_models, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base")
    report = report_of(cli("report", "--json", config=config))
    figures = dict(plots.figures(report))
    kinds = {kind.kind: kind for kind in report.kinds}
    for file, value in {
        "angles.png": lambda kind: math.degrees(kind.task_angle_average),
        "lengths.png": lambda kind: 100 * (1 - kind.task_linear_length_average),
    }.items():
        of_weights, of_tasks = figures[file].axes[:2]
        assert of_weights.get_title().endswith("the weights")
        assert of_tasks.get_title().endswith("the changes from the base")
        labels = [label.get_text() for label in of_tasks.get_xticklabels()]
        assert labels == ["outside", "0", "1", "2"]
        for name, row in cells_of(of_tasks).items():
            # Tensors of one kind and several layers have one size here.
            if name not in ("head", "embeddings", "norms"):
                assert math.isnan(row[0])
                assert np.nanmean(row) == pytest.approx(value(kinds[name]))


def test_one_outlying_cell_leaves_the_colours_to_the_others(cli, tmp_path):
    """Nine layers are 1 to 2 degrees apart, the last at right angles."""
    degrees = [*np.linspace(1, 2, 9), 90]
    for index in range(2):
        tensors = {
            f"layers.{layer}.mlp.up_proj.weight": torch.tensor(
                [[math.cos(math.radians(index * angle)), math.sin(math.radians(index * angle))]],
                dtype=torch.float64,
            )
            for layer, angle in enumerate(degrees)
        }
        save_file(tensors, tmp_path / f"m{index}.safetensors")
    files = [str(tmp_path / f"m{index}.safetensors") for index in range(2)]
    report = report_of(cli("report", "--json", config=config_for(files) | {"dtype": "float64"}))
    axes = dict(plots.figures(report))["angles.png"].axes[0]
    np.testing.assert_allclose(cells_of(axes)["up"], degrees, rtol=1e-6)
    assert axes.images[0].get_clim() == pytest.approx((0, 2))
    assert [text.get_text() for text in axes.texts] == ["90"]


@pytest.mark.parametrize(
    ("cells", "limit"),
    [([], 1.0), ([math.nan], 1.0), ([0.0, 0.0], 1.0), ([1.0, 3.0], 1.0), ([5.0, 6.0, 7.0], 7.0)],
)
def test_the_colour_scale_has_an_end(cells, limit):
    assert charts.color_limit(np.array(cells))[0] == limit
