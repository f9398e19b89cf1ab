"""Errors reach another process as they were raised."""

from __future__ import annotations

import pickle

import pytest

from cai_graph import errors
from cai_graph.errors import AwaitsReview, CaiError, MissingExtra, RunError

WAITS = {"thread_id": "7", "trajectory_id": "t1", "reason": "no-harm", "draft": "hello"}


def raised(kind: type[CaiError]) -> CaiError:
    if issubclass(kind, AwaitsReview):
        return kind(WAITS)
    if issubclass(kind, MissingExtra):
        return kind("`cai train dpo`", "trl", "train")
    return kind("words", trajectory_id="t1") if issubclass(kind, RunError) else kind("words")


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_is_the_same_after_pickling(name: str) -> None:
    error = raised(getattr(errors, name))
    error.add_note("in the third row")

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
