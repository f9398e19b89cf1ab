"""Weight averaging of reward models (WARM, Ramé et al. 2024, arXiv:2401.12187).

Members that were fine-tuned from the same weights, head included, with different seeds and orders of data lie
in one basin of the loss, so that the mean of their weights is itself a usable model (eq. 2 there). It needs
the memory and time of one model, while an ensemble needs those of all members, and memorises fewer wrong
labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cai_graph.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["averaged"]


def averaged(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the members' weights, summed in float32 and converted to the members' own dtype.

    Raises:
        DataError: there are fewer than two members, or their shapes differ; the message names the tensor.
    """
    import torch

    if len(members) < 2:
        raise DataError(f"an average is of at least two members, found {len(members)}")
    first = members[0]
    for number, member in enumerate(members[1:], 1):
        if wrong := sorted(set(first) ^ set(member)):
            raise DataError(f"member {number} differs from member 0 in its tensor {wrong[0]!r}")
        for name, tensor in member.items():
            if tensor.shape != first[name].shape:
                raise DataError(
                    f"member {number}: {name!r} has shape {tuple(tensor.shape)}, in member 0 "
                    f"{tuple(first[name].shape)}; members come from the same weights"
                )
    return {
        name: (
            torch.stack([member[name].float() for member in members]).mean(0).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor.clone()
        )
        for name, tensor in first.items()
    }
