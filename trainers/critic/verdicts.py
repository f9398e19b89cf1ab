"""Reads verdicts of critics and people on answers, as labels, from a dataset of the kind `critic`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cai_graph.errors import ConfigError, DataError
from trainers.critic.heads import FOLDS, groups_of
from trainers.export import read_rows
from trainers.rows import CriticRow, Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Labelled", "Labels", "read_labelled"]


class Labelled(NamedTuple):
    """One answer, and whether it violates one aim or principle."""

    request: str
    """The last user message, which is all of the conversation that a trained critic reads."""
    answer: str
    """The answer."""
    about: str
    """The aim or the id of the principle."""
    violates: bool
    """The label."""
    judge: str
    """The critic or person who gave it; if several did, the first."""
    test: bool = False
    """Whether it is in the dataset's test part."""


def read_labelled(folder: Path) -> tuple[list[Labelled], int]:
    """Return the labels of a dataset, one by answer and aim or principle, and the number left out.

    A person's label takes precedence over a critic's; among labels of the same rank the majority counts, and
    in a tie the label is left out.

    Raises:
        DataError: the folder has no dataset of the kind `critic` in our own row format; the message names
            the row.
    """
    format_: Literal["jsonl", "parquet"] = "parquet" if (folder / "train.parquet").exists() else "jsonl"
    if not (folder / f"train.{format_}").exists():
        raise DataError(
            f"{folder}: has no train.jsonl or train.parquet; `cai dataset build --kind critic` "
            "makes such a folder"
        )
    cells: dict[tuple[str, str, str], list[CriticRow]] = {}
    for row in read_rows(folder, "critic", format_):
        assert isinstance(row, CriticRow)
        cells.setdefault((_request(row.prompt), row.completion[0].content, row.principle), []).append(row)
    found, split = [], 0
    for (request, answer, about), rows in cells.items():
        people = [row for row in rows if row.source == "human"]
        counted = people or rows
        votes = sum(1 if row.violates else -1 for row in counted)
        if votes == 0:
            split += 1
            continue
        agreeing = next(row for row in counted if row.violates == (votes > 0))
        test = any(row.split == "test" for row in rows)
        found.append(Labelled(request, answer, about, votes > 0, agreeing.judge, test))
    return found, split


def _request(prompt: Sequence[Turn]) -> str:
    return next((turn.content for turn in reversed(prompt) if turn.role == "user"), "")


class Labels:
    """The labels of the aims and principles that have enough of them, for probes and classifiers alike."""

    def __init__(self, folder: Path, unseen: Sequence[str]) -> None:
        import numpy

        self.unseen = unseen
        every, self.disagreed = read_labelled(folder)
        trained = numpy.array([not one.test and one.judge not in unseen for one in every], bool)
        groups = groups_of([one.request for one in every], [one.answer for one in every])
        # A request that is measured on is not trained on under any aim or principle.
        trained &= ~numpy.isin(groups, groups[~trained])
        requests: dict[str, dict[bool, set[int]]] = {
            about: {True: set(), False: set()} for about in sorted({one.about for one in every})
        }
        for one, group, trains in zip(every, groups.tolist(), trained, strict=True):
            if trains:
                requests[one.about][one.violates].add(group)
        self.too_few = {
            about: f"{len(by_label[True])} requests with VIOLATES, {len(by_label[False])} with COMPLIES"
            for about, by_label in requests.items()
            if min(map(len, by_label.values())) < FOLDS
        }
        self.abouts = [about for about in requests if about not in self.too_few]
        if not self.abouts:
            listed = (
                "; ".join(f"{about}: {said}" for about, said in self.too_few.items()) or "no labels at all"
            )
            raise DataError(f"{folder}: {FOLDS} folds need {FOLDS} requests of each label; found {listed}")
        kept = numpy.array([one.about in self.abouts for one in every])
        self.rows = [one for one in every if one.about in self.abouts]
        self.y = numpy.array([int(one.violates) for one in self.rows])
        self.judges = numpy.array([one.judge for one in self.rows])
        self.about = numpy.array([one.about for one in self.rows])
        self.groups, self.trained = groups[kept], trained[kept]
        if missing := sorted(set(unseen) - set(self.judges)):
            raise ConfigError(
                f"unseen names the judges {', '.join(missing)}, and the data have "
                f"{', '.join(sorted(set(self.judges)))}"
            )

    def settings(self, about: str) -> Iterator[tuple[str, Array]]:
        """Yield the sets of rows that an aim or principle is measured on besides training data, by name."""
        import numpy

        mine = self.about == about
        test = numpy.array([labelled.test for labelled in self.rows])
        never = numpy.isin(self.judges, self.unseen)
        yield "the dataset's test part", numpy.flatnonzero(mine & test & ~never)
        for judge in self.unseen:
            yield f"{judge}, never trained on", numpy.flatnonzero(mine & (self.judges == judge))
