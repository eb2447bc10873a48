"""What report.json holds. Angles are in radians; null stands for what a model has no part in."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = "mergekit-karcher/report/1"

Vector = list[float | None]
Matrix = list[Vector]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class View(_Part):
    """Models as seen from one origin; all lists run over `models` of the report.

    linear_length: |weighted linear mean| over the weighted mean of the norms.
    """

    origin: str
    norms: Vector
    angles: Matrix
    linear_length: float | None

    def pairs(self, without: int | None = None) -> list[float]:
        """The angle between every two models that have one, but for one model."""
        return [
            angle
            for i, row in enumerate(self.angles)
            for j, angle in enumerate(row[:i])
            if angle is not None and without not in (i, j)
        ]


class Model(_Part):
    """A model of the merge: a Hub id, or for a local one the last parts of its path.

    hub_ids: those of the model and of its adapter that are on the Hub.
    """

    name: str
    hub_ids: list[str]
    is_base: bool


class Settings(_Part):
    """The config, as far as it decides the geometry; a list where filters make it several.

    as_karcher: whether it asks for another method than ours, which sees what karcher would.
    in_metric: whether angles and lengths are those of the metric that the models share.
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
    """One output tensor, on the sphere that its mean is taken on (origin, granularity).

    coefficients: k_i of W = sum k_i W_i, or with origin base of base + sum k_i (W_i - base); null
        with granularity row, which has a set for each row.
    angles_to_mean: from each model to the merged tensor; with granularity row the largest of any
        row to its own.
    spread: the root of the weighted mean of their squares.
    unique, status: whether the mean was proven to be unique, and how it ended.
    linear_gap: the distance between the Karcher mean and the linear mean scaled to its length, in
        units of what rounding to the output's dtype changes, or to that of the files where that
        is coarser; null with granularity row.
    other: the same models as seen from the other origin, where there is a base model.
    rounding: for each model, what rounding to the dtype of its file may change, over the length
        of its difference from the base. From 0.7 on that difference says nothing.
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
    other: View | None
    rounding: Vector | None

    def view(self, origin: str) -> View | None:
        """The models as seen from that origin."""
        if origin != self.origin:
            return self.other
        return View(
            origin=origin,
            norms=self.norms,
            angles=self.angles,
            linear_length=self.linear_length,
        )


class Kind(_Part):
    """All tensors of one kind of module. Lengths are as in `View`, the rest as in `Tensor`.

    angle: between two models, over tensors and pairs. task_*: as seen from the base model.
    task_rounding_median: of the model of which rounding may have taken most.
    """

    kind: str
    tensors: int
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

    whole: all tensors of each model as one vector; tied weights count once, buffers not at all.
    Where weights differ from tensor to tensor, the lengths are those of the merged vectors.
    whole_rounding: as `Tensor.rounding`, of the whole models.
    """

    schema_: str = Field(SCHEMA, alias="schema")
    version: str
    settings: Settings
    models: list[Model]
    whole: View
    whole_tasks: View | None
    whole_rounding: Vector | None
    verdict: str
    kinds: list[Kind]
    tensors: list[Tensor]

    @property
    def apart(self) -> int | None:
        """The place of a base that takes no part in the mean."""
        places = [place for place, model in enumerate(self.models) if model.is_base]
        return places[0] if places and self.settings.origin == ["base"] else None
