"""What an Adam optimizer has kept of one parameter, and the metric in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """The running mean of one parameter's squared gradients, v, and what belongs to it.

    squares: v, of the parameter's shape and any floating dtype; borrowed. step: the number of steps
    that it is of. beta2, eps: Adam's settings.
    """

    squares: torch.Tensor
    step: float
    beta2: float
    eps: float

    def metric(self) -> torch.Tensor:
        """G = sqrt(v_hat) + eps with v_hat = v / (1 - beta2^step), new in float32.

        v starts at zero, and v_hat is without that bias (Kingma & Ba 2015, algorithm 1); with beta2
        or step zero there is none. Computed in float64.
        """
        share = 1.0
        if self.beta2 > 0 and self.step > 0:
            share = -math.expm1(self.step * math.log(self.beta2))
        unbiased = self.squares.double() / share
        return unbiased.sqrt_().add_(self.eps).float()
