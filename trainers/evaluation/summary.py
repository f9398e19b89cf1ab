"""Results of an evaluation: figures with intervals, from the rows in its folder; no model is called.

The other subjects are measured against the first one. For each of them there is the change of helpfulness,
paired by prompt: a change below 0 is the alignment tax (Askell et al. 2021, arXiv:2112.00861).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from cai_graph.errors import DataError
from cai_graph.trajectory import Label, orders_disagree
from trainers.evaluation.figures import Estimate, Figure, estimate, paired
from trainers.evaluation.folder import AIMS, UNASKED, Evaluation, has_failed
from trainers.evaluation.ratings import Contest, elo, front
from trainers.evaluation.refusals import Compliance, tells_partial
from trainers.evaluation.suites import Suite
from trainers.lines import Row

__all__ = ["Pareto", "Summary", "Table", "summarise", "table"]


class Pareto(NamedTuple):
    """Subjects by helpfulness and harmlessness."""

    helpful_by: str
    """The grader of helpfulness."""
    harmless_by: str
    """The grader of harmlessness."""
    points: dict[str, tuple[Estimate, Estimate]]
    """Helpfulness and harmlessness of each subject."""
    front: list[str]
    """The subjects on the Pareto front, ordered by helpfulness."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of an evaluation."""

    subjects: tuple[str, ...]
    """Names of the subjects; the others are measured against the first."""
    figures: tuple[Figure, ...]
    """All figures, grouped by suite."""
    fronts: tuple[Pareto, ...]
    """One for each pair of graders that graded at least two subjects."""
    notes: tuple[str, ...]
    """Caveats for readers."""

    def json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "subjects": list(self.subjects),
            "figures": [figure.json() for figure in self.figures],
            "fronts": [
                {
                    "helpful_by": found.helpful_by,
                    "harmless_by": found.harmless_by,
                    "front": found.front,
                    "points": {
                        name: {"helpful": x.json(), "harmless": y.json()}
                        for name, (x, y) in found.points.items()
                    },
                }
                for found in self.fronts
            ],
            "notes": list(self.notes),
        }


def summarise(evaluation: Evaluation) -> Summary:
    """Return the figures of an evaluation.

    Raises:
        DataError: a file cannot be read.
    """
    figures: list[Figure] = []
    notes = list(evaluation.notes)
    by_aim: dict[Suite, dict[str, dict[str, Estimate]]] = {}
    for suite in evaluation.suites():
        figures += _of_answers(evaluation, suite)
        for by, graded in evaluation.grades(suite).items():
            if suite in AIMS:
                found = _of_values(evaluation, suite, by, graded)
                by_aim.setdefault(suite, {})[by] = {
                    figure.subject: figure.estimate
                    for figure in found
                    if figure.measure == AIMS[suite] and figure.estimate.n
                }
            else:
                found = _of_classes(evaluation, by, graded)
            figures += found
        for by, contests in evaluation.contests(suite).items():
            outcomes = _outcomes(contests)
            figures += _win_rates(evaluation, suite, by, contests, outcomes)
            try:
                figures += _elo(evaluation, suite, by, outcomes)
            except DataError as error:
                notes.append(f"{suite}, by {by}: no Elo: {error}")
    fronts = tuple(
        _pareto(helpful_by, harmless_by, helpful, harmless)
        for helpful_by, helpful in by_aim.get("helpfulness", {}).items()
        for harmless_by, harmless in by_aim.get("harmlessness", {}).items()
        if len(helpful.keys() & harmless.keys()) > 1
    )
    return Summary(subjects=evaluation.subjects, figures=tuple(figures), fronts=fronts, notes=tuple(notes))


def _of_answers(evaluation: Evaluation, suite: Suite) -> list[Figure]:
    """Return the figures that are counted: words, and answers that were cut."""
    figures = []
    prompts = {prompt.id for prompt in evaluation.of_suite(suite)}
    for name in evaluation.subjects:
        rows = [row for row in evaluation.answers(name) if row["prompt"] in prompts]
        for measure, bounded, value in (
            ("words", False, lambda row: float(len(row["answer"].split()))),
            ("cut short", True, lambda row: float(row["cut"] is not None)),
        ):
            found = estimate(_by_prompt(rows, value), bounded=bounded)
            figures.append(
                _figure(len(prompts), found, subject=name, suite=suite, measure=measure, by="count")
            )
    return figures


def _of_values(
    evaluation: Evaluation, suite: Suite, by: str, graded: Mapping[str, Sequence[Row]]
) -> list[Figure]:
    """Return each subject's mean grade, share of violations, and change against the first subject."""
    figures: list[Figure] = []
    aim = AIMS[suite]
    prompts = len(evaluation.of_suite(suite))
    values = {name: _by_prompt(_graded(rows), lambda row: row["value"]) for name, rows in graded.items()}
    first = evaluation.subjects[0]
    for name, rows in graded.items():
        readable = _graded(rows)
        figure = partial(
            _figure,
            prompts,
            subject=name,
            suite=suite,
            by=by,
            note=_notes(_note(evaluation, name, by), _outage(rows)),
        )
        # A grader with verdicts returns probabilities; a reward is any number.
        of_critic = any(row["label"] is not None for row in readable)
        figures.append(figure(estimate(values[name], bounded=of_critic), measure=aim))
        if of_critic:
            violates = _by_prompt(readable, lambda row: float(row["label"] == Label.VIOLATES))
            figures.append(figure(estimate(violates, bounded=True), measure="violates"))
        if name != first and first in values:
            change = paired(values[name], values[first])
            figures.append(figure(change, measure=f"change of {aim}", against=first))
    return figures


def _of_classes(evaluation: Evaluation, by: str, graded: Mapping[str, Sequence[Row]]) -> list[Figure]:
    """Return the shares of XSTest's classes: each class on safe prompts, any refusal on unsafe ones."""
    figures = []
    for name, rows in graded.items():
        readable = _graded(rows)
        for safe in (True, False):
            prompts = {prompt.id for prompt in evaluation.of_suite("over-refusal") if prompt.safe is safe}
            here = [row for row in readable if row["prompt"] in prompts]
            if not prompts:
                continue
            measures: dict[str, Callable[[Row], float]] = {
                each: lambda row, each=each: float(row["label"] == each)  # type: ignore[misc]
                for each in Compliance
                if each is not Compliance.PARTIAL_REFUSAL or tells_partial(by)
            }
            if not safe:
                measures = {"refuses unsafe": lambda row: float(row["label"] != Compliance.FULL_COMPLIANCE)}
            figures += [
                _figure(
                    len(prompts),
                    estimate(_by_prompt(here, value), bounded=True),
                    subject=name,
                    suite="over-refusal",
                    measure=str(measure),
                    by=by,
                    note=_notes(
                        _note(evaluation, name, by),
                        _outage([row for row in rows if row["prompt"] in prompts]),
                    ),
                )
                for measure, value in measures.items()
            ]
    return figures


def _outcomes(rows: Sequence[Row]) -> list[Contest]:
    """Return the outcomes of the comparisons.

    If the judge prefers another answer when the order is reversed, the outcome is a tie. A pair with an order
    that could not be read is left out.
    """
    return [Contest(row["prompt"], row["a"], row["b"], _outcome(*row["p_a"])) for row in rows if _read(row)]


def _win_rates(
    evaluation: Evaluation, suite: Suite, by: str, rows: Sequence[Row], outcomes: Sequence[Contest]
) -> list[Figure]:
    """Return the win rate of each subject against the first."""
    figures = []
    first = evaluation.subjects[0]
    prompts = len(evaluation.of_suite(suite))
    for name in evaluation.subjects[1:]:
        met = [row for row in rows if {row["a"], row["b"]} == {name, first}]
        wins = {
            contest.prompt: [contest.p_a if contest.a == name else 1 - contest.p_a]
            for contest in outcomes
            if {contest.a, contest.b} == {name, first}
        }
        if met:
            figures.append(
                _figure(
                    prompts,
                    estimate(wins, bounded=True),
                    subject=name,
                    suite=suite,
                    measure="win rate",
                    by=by,
                    against=first,
                    note=_notes(
                        _note(evaluation, name, by), _bias([row for row in met if _read(row)]), _outage(met)
                    ),
                )
            )
    return figures


def _elo(evaluation: Evaluation, suite: Suite, by: str, outcomes: Sequence[Contest]) -> list[Figure]:
    """Return the Elo ratings of the subjects that were compared.

    Raises:
        DataError: the comparisons do not put them on a common scale.
    """
    prompts = len(evaluation.of_suite(suite))
    return [
        _figure(
            prompts,
            rated,
            subject=name,
            suite=suite,
            measure="Elo",
            by=by,
            note=_note(evaluation, name, by),
        )
        for name, rated in (elo(outcomes) if outcomes else {}).items()
    ]


def _figure(prompts: int, found: Estimate, **fields: Any) -> Figure:
    """Return a figure that counts as left out those of `prompts` prompts that are not in its estimate.

    These have no answer, or no judgement that could be read.
    """
    return Figure(estimate=found, left_out=prompts - found.n, **fields)


def _read(row: Row) -> bool:
    return None not in row["p_a"]


def _outcome(first: float, second: float) -> float:
    """Return 1, 0.5 or 0 from P(A) in both orders."""
    if orders_disagree(first, second):
        return 0.5
    mean = (first + second) / 2
    return 0.5 if mean == 0.5 else float(mean > 0.5)


def _bias(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    asked = [row for row in rows if row["why"] != "the same answer"]
    if not asked:
        return "all answers were the same"
    turned = sum(orders_disagree(*row["p_a"]) for row in asked)
    return f"in {turned} of {len(asked)} the judge chose a place, which is a tie"


def _graded(rows: Sequence[Row]) -> list[Row]:
    """Return the grades that could be read."""
    return [row for row in rows if row["value"] is not None or row["label"] is not None]


def _by_prompt(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            found.setdefault(row["prompt"], []).append(number)
    return found


def _note(evaluation: Evaluation, subject: str, by: str) -> str:
    chosen_by = evaluation.about(subject).get("by")
    if chosen_by is not None and _who(by) == _who(chosen_by):
        return "chosen by the one who grades, so it flatters"
    return ""


def _who(by: str) -> str:
    """Return the model in the name of a grader or a judge, whatever its role.

    >>> critic, reward = "m by claim as critic under c (1f)", "judge:m under c (1f) as reward"
    >>> {_who(by) for by in (reward, critic, "m under c (1f)", "m reasoning under c (1f)")}
    {'m'}
    """
    name = by.partition(" as ")[0].partition(" under ")[0]
    return (
        name.removesuffix(" by claim")
        .removesuffix(" reasoning")
        .removeprefix("judge:")
        .removeprefix("critic:")
    )


def _outage(rows: Sequence[Row]) -> str:
    """Return a note on the answers without a judgement: the request failed, or was not made yet."""
    errors = [row["error"] for row in rows if has_failed(row)]
    waiting = errors.count(UNASKED)
    failed = [error for error in errors if error != UNASKED]
    of = f"of {len(rows)}"
    return _notes(
        f"{len(failed)} {of} were not judged ({failed[0]}); the same command asks again" if failed else "",
        f"{waiting} {of} are {UNASKED}; `cai evaluate score` with this judge asks about them"
        if waiting
        else "",
    )


def _notes(*said: str) -> str:
    return "; ".join(one for one in said if one)


def _pareto(
    helpful_by: str, harmless_by: str, helpful: Mapping[str, Estimate], harmless: Mapping[str, Estimate]
) -> Pareto:
    points = {name: (helpful[name], harmless[name]) for name in helpful if name in harmless}
    best = front({name: (x.value, y.value) for name, (x, y) in points.items()})
    return Pareto(helpful_by, harmless_by, points, best)


# --- side by side -------------------------------------------------------------------------------------

_SHOWN = (
    "harmless",
    "change of harmless",
    "helpful",
    "change of helpful",
    Compliance.FULL_REFUSAL.value,
    Compliance.PARTIAL_REFUSAL.value,
    "refuses unsafe",
    "win rate",
    "Elo",
)
"""Measures of the table, in order. The JSON contains the others, too."""


class Table(NamedTuple):
    """Harmlessness, helpfulness and over-refusal side by side: a row for each subject."""

    header: list[str]
    """`subject`, then the measures, each with the letter of its suite and judge in `key`."""
    rows: list[list[str]]
    """A cell is value, 95 % interval and number of prompts; a dash where there is no figure."""
    key: list[str]
    """The suite and judge of each letter, and caveats for readers."""


def table(summary: Summary) -> Table:
    """Return the most important figures as one table."""
    columns: list[tuple[str, str, str]] = []
    for measure in _SHOWN:
        for figure in summary.figures:
            column = (measure, figure.suite, figure.by)
            if figure.measure == measure and column not in columns:
                columns.append(column)
    judges = list(dict.fromkeys((suite, by) for _, suite, by in columns))
    letters = {judge: chr(ord("a") + number) for number, judge in enumerate(judges)}
    cells = {(f.subject, f.measure, f.suite, f.by): f for f in summary.figures}
    rows = []
    for name in summary.subjects:
        found = [cells.get((name, *column)) for column in columns]
        rows.append([name, *("–" if figure is None else _cell(figure) for figure in found)])
    key = [f"{letters[suite, by]}: {suite}, by {by}" for suite, by in judges]
    for figure in summary.figures:
        said = []
        if figure.left_out and figure.measure in _SHOWN:
            said.append(f"{figure.left_out} could not be read or answered, and are left out")
        if figure.note and figure.measure in _SHOWN:
            said.append(figure.note)
        if said:
            key.append(f"{figure.subject}, {figure.measure} ({figure.suite}): {'; '.join(said)}")
    if any(column[0].startswith(("change", "win")) for column in columns):
        key.append(f"change and win rate: against {summary.subjects[0]}, paired by prompt")
    key += summary.notes
    header = ["subject", *(f"{measure} [{letters[suite, by]}]" for measure, suite, by in columns)]
    return Table(header, rows, list(dict.fromkeys(key)))


def _cell(figure: Figure) -> str:
    value, low, high, n = figure.estimate
    if not n:
        return "–"
    form = "{:.0f}" if figure.measure == "Elo" else "{:.2f}"
    sign = "+" if figure.measure.startswith("change") and value > 0 else ""
    interval = f"{form.format(low)} to {form.format(high)}, " if high - low < float("inf") else ""
    return f"{sign}{form.format(value)} ({interval}n = {n})"
