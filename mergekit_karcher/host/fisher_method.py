"""`merge_method: fisher`, as mergekit sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_karcher import __version__
from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.parameters import (
    floor_parameter,
    metric_parameter,
    origin_parameter,
    weight_parameter,
)
from mergekit_karcher.host.run import FISHER, label, note_zero_metrics, record
from mergekit_karcher.means.fisher import precision_weighted
from mergekit_karcher.means.karcher import Group

NAME = FISHER
IDENTITY = "identity"
# The extra parameter that the plan adds: the metrics themselves, by model.
METRICS = "metrics"

REFERENCE_URL = "https://arxiv.org/abs/2111.09832"


def build_fisher() -> Any:
    """A method for mergekit's registry, made when mergekit is whole."""
    import torch
    from mergekit.merge_methods.base import (
        GroupMergeMethod,
        MergeMethodSpec,
        PerInputValues,
        TensorGroup,
    )

    class FisherMerge(GroupMergeMethod):  # type: ignore[misc]
        """The precision-weighted mean; see `mergekit_karcher.fisher_mean`.

        origin: base takes the mean of the differences from the base model and adds it back; that is
        the mean of the others, so the base just takes no part.
        """

        spec = MergeMethodSpec(
            name=NAME,
            pretty_name=f"Fisher-weighted mean (mergekit-karcher {__version__})",
            reference_url=REFERENCE_URL,
            parameters=(
                weight_parameter(),
                metric_parameter(),
                origin_parameter(),
                floor_parameter(),
            ),
        )

        def merge_group(
            self,
            group: TensorGroup,
            /,
            *,
            weight: PerInputValues,
            metric: PerInputValues,
            origin: str,
            floor: float,
            metrics: Mapping[Any, Any] | None = None,
        ) -> torch.Tensor:
            """One output tensor, with the metrics that the plan had loaded."""
            name = group.metadata.name or "the tensor"
            if metrics is None:
                raise KarcherError(
                    "merge_method: fisher reads its metrics in mergekit's commands; in Python call "
                    "mergekit_karcher.fisher_mean with tensors and metrics."
                )
            # Weights that sum to one leave of the base what is subtracted of it.
            entries = group.non_base if origin == "base" else group.entries
            tensors = [entry.tensor for entry in entries]
            labels = [label(name, str(entry.id)) for entry in entries]
            own = [metrics.get(entry.id) for entry in entries]
            merged, seen = precision_weighted(
                tensors,
                [None if m is None else m.to(tensors[0].device) for m in own],
                weight.values_for(entries),
                floor,
                labels,
                name,
            )
            if not seen:
                note_zero_metrics(name)
            record(Group(name, [entry.tensor for entry in group.entries], labels), None)
            return merged

    return FisherMerge()
