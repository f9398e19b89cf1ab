"""Weight averages: the mean of the tensors, and only of what belongs together."""

from __future__ import annotations

import pytest

from cai_graph.errors import DataError

torch = pytest.importorskip("torch")

from trainers.reward.averaging import averaged  # noqa: E402


def test_the_average_is_the_mean_of_each_tensor() -> None:
    one = {"w": torch.tensor([[1.0, 2.0]]), "steps": torch.tensor(3)}
    two = {"w": torch.tensor([[3.0, 6.0]]), "steps": torch.tensor(3)}
    three = {"w": torch.tensor([[5.0, 1.0]]), "steps": torch.tensor(3)}

    found = averaged([one, two, three])

    assert found["w"].tolist() == [[3.0, 3.0]]
    assert found["steps"].tolist() == 3


def test_small_differences_survive_bfloat16() -> None:
    # Summed in bfloat16, 256 + 2 would be rounded away at each step.
    members = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}] * 3
    members += [{"w": torch.tensor([264.0], dtype=torch.bfloat16)}]

    found = averaged(members)["w"]

    assert (found.dtype, found.item()) == (torch.bfloat16, 258.0)


def test_members_of_other_shapes_or_names_are_refused_by_the_tensor() -> None:
    one = {"score.weight": torch.zeros(1, 4)}

    with pytest.raises(DataError, match=r"member 1: 'score.weight' has shape \(1, 8\), in member 0 \(1, 4\)"):
        averaged([one, {"score.weight": torch.zeros(1, 8)}])
    with pytest.raises(DataError, match="member 1 differs from member 0 in its tensor 'head'"):
        averaged([one, {"score.weight": torch.zeros(1, 4), "head": torch.zeros(1)}])
    with pytest.raises(DataError, match="at least two members, found 1"):
        averaged([one])
