"""What report.json holds. Angles are in radians; null stands for models without a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = "mergekit-karcher/report/1"

# Where rounding error is this share of a difference, it is as long as the true rest (sqrt(1/2)):
# from there on angles mean nothing.
NOISE = 0.7

Vector = list[float | None]
Matrix = list[Vector]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class View(_Part):
    """The models as seen from one origin, in the order of the report's `models`.

    origin: "zero" or "base".
    norms: the distance of each model from the origin.
    angles: between every two models.
    linear_length: |weighted linear mean| over the weighted mean of the norms.
    """

    origin: str
    norms: Vector
    angles: Matrix
    linear_length: float | None

    def pairs(self, *without: int | None) -> list[float]:
        """The angles between every two models, but for those at these places."""
        return [
            angle
            for i, row in enumerate(self.angles)
            for j, angle in enumerate(row[:i])
            if angle is not None and i not in without and j not in without
        ]


class Model(_Part):
    """A model of the merge.

    name: its Hub id, or for a local model the last part or parts of its path.
    hub_ids: of the model and its adapter, those that are on the Hub.
    weight_range: the smallest and the largest of its weights over the tensors, where all weights of
        a tensor sum to one; null for a base that the mean is taken around.
    """

    name: str
    hub_ids: list[str]
    is_base: bool
    weight_range: tuple[float, float] | None = None


class Settings(_Part):
    """What in the config decides the geometry; a list, since filters may give several values.

    as_karcher: whether the config asks for another method, and the report shows what karcher would
        do with its models, weights and base.
    in_metric: whether angles and lengths are measured in the metric that the models share.
    """

    merge_method: str
    as_karcher: bool
    granularity: list[str]
    origin: list[str]
    magnitude: list[str]
    dtype: str | None
    out_dtype: str | None
    in_metric: bool = False


class Tensor(_Part):
    """One output tensor, as seen from the origin that its mean is taken around.

    kind, layer: the kind of module and the number of the layer, by the tensor's name.
    norms, angles, linear_length: as in `View`.
    coefficients: k_i of W = sum k_i W_i, or with origin base of base + sum k_i (W_i - base); null
        with granularity row, where each row has its own.
    angles_to_mean: from each model to the merged tensor; with granularity row, the largest angle
        of any row to the mean of that row.
    spread: the root of the weighted mean of the squares of angles_to_mean.
    unique: whether the mean was proven to be unique.
    status: how the search for it ended: converged, not_converged, not_unique or zero.
    linear_gap: the distance between the Karcher mean and the linear mean scaled to its length, in
        units of what rounding to the output's dtype changes, or to the dtype of the files where
        that is coarser; null with granularity row.
    linear_difference: the distance between the Karcher mean and the linear mean, over the length of
        the Karcher mean; null with granularity row.
    other: the same models as seen from the other origin, where there is a base model.
    rounding: for each model, what rounding to the dtype of its file may change, over the length
        of its difference from the base. From 0.7 on, the angles of that difference mean nothing.
    shares: with merge_method fisher, how much each model counts, on average over the elements; they
        sum to one. What only a Karcher mean has is then null.
    input_overlap: how much the inputs overlap that models changed the treatment of: the cosine
        between the metrics t_k' t_k, t_k = W_k - base, on average over every two models.
    inputs_in_use: the part of all directions of its input that all changes together take, 1 over
        in tr(A^2) with A the weighted mean of t_k' t_k / |t_k|^2.
    inputs_of_each: the same of each model's change alone. All three are null without a base, and
        for what is no linear layer; models whose whole difference from the base is noise do not
        count.
    """

    name: str
    shape: list[int]
    kind: str
    layer: int | None
    origin: str
    granularity: str
    norms: Vector
    angles: Matrix
    linear_length: float | None
    coefficients: Vector | None
    angles_to_mean: Vector
    spread: float | None
    unique: bool
    status: str
    linear_gap: float | None
    linear_difference: float | None
    other: View | None
    rounding: Vector | None
    shares: Vector | None = None
    input_overlap: float | None = None
    inputs_in_use: float | None = None
    inputs_of_each: Vector | None = None

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return math.prod(self.shape)

    def view(self, origin: str) -> View | None:
        """The models as seen from that origin."""
        if origin != self.origin:
            return self.other
        return View(**{name: getattr(self, name) for name in View.model_fields})


def seen(tensors: Iterable[Tensor], origin: str) -> list[View]:
    """The views of those tensors that are seen from that origin."""
    return [view for tensor in tensors if (view := tensor.view(origin))]


class Kind(_Part):
    """All tensors of one kind of module; see `Tensor` and `View` for what is summed up.

    *_average: each tensor counts by its number of parameters.
    angle_*: over all tensors and pairs of models, as seen from zero.
    task_*: as seen from the base model; averages and the largest angle without the models whose
        whole difference from it is noise.
    task_rounding_median: over tensors, of the model that rounding may have changed most.
    task_is_noise: whether that is too much for the angles to mean anything, of those models.
    input_overlap_average, inputs_in_use_average: over its linear layers.
    """

    kind: str
    tensors: int
    parameters: int
    angle_average: float | None
    linear_length_average: float | None
    linear_difference_average: float | None
    task_angle_average: float | None
    task_angle_largest: float | None
    task_is_noise: bool
    task_linear_length_average: float | None
    shares: Vector | None = None
    input_overlap_average: float | None = None
    inputs_in_use_average: float | None = None
    angle_median: float | None
    angle_largest: float | None
    spread_median: float | None
    linear_length_median: float | None
    linear_gap_largest: float | None
    not_unique: int
    task_angle_median: float | None
    task_linear_length_median: float | None
    task_rounding_median: float | None


class Report(_Part):
    """The geometry of one merge.

    whole: all tensors of each model as one vector, as seen from zero; tied weights count once,
        buffers not at all. Where weights differ from tensor to tensor, its linear_length is that
        of the merged vectors.
    whole_tasks: the same as seen from the base model; null where there is none.
    whole_rounding: as `Tensor.rounding`, of whole models.
    verdict: what the numbers mean, in a few sentences.
    overall: all tensors together, as one kind of the name "all".
    """

    schema_: str = Field(SCHEMA, alias="schema")
    version: str
    settings: Settings
    models: list[Model]
    whole: View
    whole_tasks: View | None
    whole_rounding: Vector | None
    verdict: str
    overall: Kind
    kinds: list[Kind]
    tensors: list[Tensor]

    @property
    def apart(self) -> int | None:
        """The place of a base that the mean is taken around, and so takes no part in it."""
        places = [place for place, model in enumerate(self.models) if model.is_base]
        return places[0] if places and self.settings.origin == ["base"] else None

    @property
    def noise(self) -> list[int]:
        """The places of the models whose whole difference from the base is rounding error."""
        return noise_in(self.whole_rounding)


def noise_in(rounding: Vector | None) -> list[int]:
    """The places where rounding error is so much of a difference that its angles mean nothing."""
    return [place for place, share in enumerate(rounding or []) if share and share >= NOISE]
