"""Soft labels of preference pairs: reading them from a row, and the loss on them.

For a pair with P(chosen is better) = p, weight w and the model's margin d, the loss is the cross-entropy

    w · −(p log σ(d) + (1 − p) log σ(−d))

With p = 1 it is the Bradley-Terry loss. With p = 0.6 its minimum is H(0.6) = 0.6730 nats, at d = logit 0.6:
a pair about which the judges were unsure does not push its answers further apart than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cai_graph.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["READS", "Labelled", "label_of", "soft_loss"]

READS = frozenset({"p_chosen", "weight", "margin"})
"""Columns that label pairs. `margin`, which is 2 p_chosen − 1, is accepted but ignored beside `p_chosen`."""


def soft_loss(margins: Tensor, p_chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of each pair in nats.

    Args:
        margins: (B,) how strongly the model prefers chosen, as the logit of a probability.
        p_chosen: (B,) P(chosen is better), in [0, 1].
        weights: (B,) above 0.

    Returns:
        (B,) weight times the cross-entropy.
    """
    from torch.nn.functional import logsigmoid

    # log σ(−d) = log σ(d) − d
    return weights * ((1 - p_chosen) * margins - logsigmoid(margins))


def label_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return `p_chosen` and `weight` of a row; each defaults to 1.

    Raises:
        DataError: one is out of its range, or the row has a margin but no p_chosen.
    """
    p_chosen, weight = row.get("p_chosen", 1.0), row.get("weight", 1.0)
    if "margin" in row and "p_chosen" not in row:
        raise DataError(
            "has a 'margin' and no 'p_chosen', which is what is read; p_chosen = (1 + margin) / 2"
        )
    if not isinstance(p_chosen, int | float) or not 0 <= p_chosen <= 1:
        raise DataError(f"'p_chosen' is a probability, found {p_chosen!r}")
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise DataError(f"'weight' is a number above 0, found {weight!r}")
    return {"p_chosen": float(p_chosen), "weight": float(weight)}


class Labelled:
    """A collator that adds labels and weights to the batches of another collator."""

    def __init__(self, pairs: Any) -> None:
        """Wrap the collator `pairs`."""
        self.pairs = pairs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch with `p_chosen` and `weight`, each (B,) float32."""
        import torch

        batch: dict[str, Any] = self.pairs(rows)
        for name in ("p_chosen", "weight"):
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch
