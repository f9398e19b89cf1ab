"""Renders records and tables for the terminal, with rich; used by the `cai` commands.

Text by models, users and files is untrusted: it is passed through `clean`, and shown as text, never as
markup.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cai_graph.trajectory import Critique, Label, Outcome, Revision, Trajectory, revision_at, text_of

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackHandler

    from cai_graph.bulk import Summary

__all__ = ["brief", "clean", "count", "one_line", "progress", "summary", "table", "trajectory", "word_diff"]

MAX_CHARS = 20_000
"""How many characters of one text are shown; the rest is in the JSON."""

MAX_DIFF_WORDS = 4_000
"""Texts with more words are shown without a diff, whose time grows with the product of their lengths."""

MAX_DIFF_PAIRS = 150_000
"""So are texts with more pairs of equal words: for "a a a …" the time grows with the cube of the length.
Two texts of 4,000 words of prose have about 130,000 such pairs."""

_LABELS = {Label.VIOLATES: "bold red", Label.COMPLIES: "green", Label.UNREADABLE: "bold yellow"}
_OUTCOMES = {
    Outcome.KEPT: "green",
    Outcome.REVISED: "bold cyan",
    Outcome.EXHAUSTED: "bold yellow",
    Outcome.REFUSED: "magenta",
    Outcome.FAILED: "bold red",
    Outcome.UNJUDGED: "dim",
}

_UNJUDGED = {
    "sample": "not in the sample",
    "overload": "too many others were waiting",
    "shutdown": "the process ended",
}
"""`Trajectory.unjudged` -> the reason in words."""

# --- untrusted text -----------------------------------------------------------------------------------

_JOINERS = {"\u200c", "\u200d"}  # needed by Persian and emoji, and harmless
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e]")


def clean(text: str) -> str:
    """Return text that cannot control the terminal: dangerous characters are spelt out as escapes.

    These are control characters (except line end and tab), the marks that reverse or hide text, line
    separators and lone surrogates.

    >>> clean("a\\x1b[2Jb\\u202ec")
    'a\\\\x1b[2Jb\\\\u202ec'
    """
    return _SUSPECT.sub(lambda match: _spelt(match[0]), text.replace("\r\n", "\n"))


def _spelt(char: str) -> str:
    if unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} or char in _JOINERS:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str, width: int) -> str:
    """Return the text on one line of at most `width` characters, cleaned."""
    line = " ".join(clean(text[: 4 * width]).split())
    return line if len(line) <= width and len(text) <= 4 * width else line[: width - 1] + "…"


def _shown(text: str) -> str:
    rest = len(text) - MAX_CHARS
    return clean(text) if rest <= 0 else f"{clean(text[:MAX_CHARS])}\n… {rest:,} more characters; see --json"


# --- word diff ----------------------------------------------------------------------------------------

_ISLAND_WORDS = 3
"""Two changes with fewer unchanged words between them are shown as one change, which is easier to read."""


def word_diff(before: str, after: str) -> Text:
    """Return a coloured diff of two texts, word by word, with `[-removed-]` and `{+added+}`."""
    old, new = _words(before), _words(after)
    if max(len(old), len(new)) > MAX_DIFF_WORDS or _same_pairs(old, new) > MAX_DIFF_PAIRS:
        return Text(_shown(after), "green")
    shown = Text()
    for gone, added, same in _changes(old, new):
        for words, style, marks in ((gone, "red strike", "[--]"), (added, "green", "{++}")):
            if text := clean("".join(words)):
                body = text.rstrip()
                shown.append(f"{marks[:2]}{body}{marks[2:]}{text[len(body) :] or ' '}", style)
        shown.append(clean("".join(same)))
    return shown


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|^\s+", text)


def _same_pairs(old: Sequence[str], new: Sequence[str]) -> int:
    """Return the number of pairs of an old word and a new word that are equal."""
    before, after = (Counter(word.strip() for word in words) for words in (old, new))
    return sum(times * after[word] for word, times in before.items())


_Change = tuple[list[str], list[str], list[str]]


def _changes(old: Sequence[str], new: Sequence[str]) -> list[_Change]:
    """Return (removed, added, unchanged words after them) in order; only the first may have no change."""
    plain_old, plain_new = [word.strip() for word in old], [word.strip() for word in new]
    found: list[_Change] = [([], [], [])]
    matcher = difflib.SequenceMatcher(None, plain_old, plain_new, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            found[-1][2].extend(new[j:j_end])
            continue
        same = found[-1][2]
        if len(found) > 1 and len(same) < _ISLAND_WORDS:
            gone, added, _ = found.pop()
            found.append(([*gone, *same, *old[i:i_end]], [*added, *same, *new[j:j_end]], []))
        else:
            found.append((list(old[i:i_end]), list(new[j:j_end]), []))
    return found


# --- one trajectory -----------------------------------------------------------------------------------


def trajectory(record: Trajectory) -> RenderableType:
    """Return one Trajectory in full: conversation, draft, verdicts, critique, revisions, outcome."""
    parts: list[RenderableType] = []
    for message in record.messages:
        parts += _block(message.role, _shown(text_of(message)))
    draft = "" if record.draft is None else text_of(record.draft.answer)
    if record.draft is not None:
        parts += _block(f"draft{_how(record)}", _shown(draft) or "(no text)")
    for number, round_ in enumerate(record.rounds, 1):
        if number == 1 or round_.of != "draft":
            parts += _block(f"verdicts on the {_name(round_.of)}", _verdicts(round_.critique))
            if round_.critique.reasoning:
                parts += _block("critique", _shown(round_.critique.reasoning))
        for index, revision in enumerate(round_.revisions, 1):
            parts += _revision(f"{number}.{index}", revision, draft)
    if record.released is not None and record.released_from in ("refusal", "human"):
        parts += _block(f"released: {record.released_from}", _shown(text_of(record.released)))
    parts.append(_ending(record))
    return Group(*parts)


def _block(title: str, body: RenderableType | str) -> list[RenderableType]:
    content = Text(body) if isinstance(body, str) else body
    return [Text(clean(title), "bold"), Padding(content, (0, 0, 1, 2))]


def _how(record: Trajectory) -> str:
    """Return notes for a draft's title: whether it is cut off or unfinished, and when it was released."""
    assert record.draft is not None
    draft, blocks = record.draft, record.draft.blocks
    said = [", cut at its token limit"] if draft.truncated else []
    if draft.unfinished:
        said.append(", which the app had not finished")
    if blocks:
        gone = f"{len(draft.frozen):,} characters" if draft.frozen else "nothing"
        said.append(f", judged in blocks of which {gone} left at once")
    if record.mode == "audit":
        said.append(", released before the verdict")
    return "".join(said)


def _name(of: str) -> str:
    """Return the name of an answer with numbers from 1: `draft`, or `revision 1.2` for `revision:0:1`.

    Any other name is shown as `answer`: an earlier release redacted this field as if it were text.
    """
    if (place := revision_at(of)) is None:
        return "draft" if of == "draft" else "answer"
    number, index = place
    return f"revision {number + 1}.{index + 1}"


def _verdicts(critique: Critique) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for position in range(4):
        grid.add_column(no_wrap=position < 3, overflow="fold")
    rows: list[list[Text]] = []
    for verdict in critique.verdicts:
        notes = [] if verdict.severity is None else [f"severity {verdict.severity} of 5"]
        if verdict.probability is not None:
            notes.append(f"p = {verdict.probability:.2f}")
        about = verdict.principle or ("the whole answer" if verdict.aim is None else f"aim: {verdict.aim}")
        reason = one_line(verdict.reason or "", 300)
        label, found = Text(verdict.label.value, _LABELS[verdict.label]), Text(", ".join(notes), "dim")
        rows.append([label, Text(clean(about)), found, Text(reason, "dim")])
        grid.add_row(*rows[-1])
    verdicts = _Fitting(grid, rows, whole=3, least=20)
    below: list[RenderableType] = []
    if critique.readings:
        readings = ", ".join(f"{clean(name)} {value:.2f}" for name, value in critique.readings.items())
        below.append(Text(f"the probe reads: {readings}", "dim"))
    if critique.cascade is not None:
        who, why = clean(critique.critic or "unknown"), _WHY[critique.cascade.why]
        below.append(Text(f"decided by {who}: {why.format(critique.cascade.threshold)}", "dim"))
    return Group(verdicts, *below) if below else verdicts


_WHY = {
    "cleared": "P(VIOLATES) is below {}",
    "above": "the cheap critic's P(VIOLATES) is not below {}",
    "unreadable": "the cheap critic gave no probability",
    "failed": "the cheap critic failed",
    "sample": "both critics are asked about a sample",
}
"""`Cascaded.why` -> the reason in words."""


def _revision(name: str, revision: Revision, draft: str) -> list[RenderableType]:
    afresh = "" if revision.from_draft else ", written without sight of the draft"
    if not revision.accepted:
        why = "unknown" if revision.rejection is None else revision.rejection.value.replace("_", " ")
        detail = f" ({one_line(revision.detail, 200)})" if revision.detail else ""
        shortened = one_line(text_of(revision.answer), 200) or "(no text)"
        return _block(f"revision {name}: rejected, {why}{detail}{afresh}", Text(shortened, "dim"))
    return _block(
        f"revision {name}: accepted{afresh}; [-draft-] against {{+revision+}}",
        word_diff(draft, text_of(revision.answer)),
    )


def _ending(record: Trajectory) -> Text:
    generations = sum(call.kind == "generation" for call in record.calls)
    forward = len(record.calls) - generations
    passes = f" and {count(forward, 'forward pass', 'forward passes')}" if forward else ""
    facts = [f"{count(generations, 'call')}{passes}"]
    read = sum(call.input_tokens or 0 for call in record.calls)
    written = sum(call.output_tokens or 0 for call in record.calls)
    if read or written:
        facts.append(f"{read:,} tokens read, {written:,} written")
    facts.append(f"{record.seconds:.1f} s")
    facts.append(f"constitution {record.constitution.name} {record.constitution.version}")
    line = Text().append(record.outcome.value, _OUTCOMES[record.outcome])
    if record.unjudged is not None:
        line.append(f"  {_UNJUDGED[record.unjudged]}")
    if record.error is not None:
        line.append(f"  {one_line(record.error, 500)}", "red")
    line.append(f"  {clean(', '.join(facts))}\n", "dim")
    return line.append(record.id, "dim")


def brief(record: Trajectory, *, about: str = "") -> RenderableType:
    """Return one Trajectory in a few lines: prompt, draft, violated principles, diff, all shortened."""
    head = Text().append(f"{record.outcome.value:<10}", _OUTCOMES[record.outcome])
    head.append(f"{about}  " if about else "", "dim")
    head.append(one_line(record.prompt, 110), "bold")
    lines: list[RenderableType] = [head]
    draft = "" if record.draft is None else text_of(record.draft.answer)
    lines.append(_indented("draft     ", Text(one_line(draft, 200))))
    if names := record.violated:
        lines.append(_indented("violates  ", Text(clean(", ".join(names)), "red")))
    released = "" if record.released is None else text_of(record.released)
    if record.outcome is Outcome.REVISED:
        lines.append(_indented("revision  ", word_diff(one_line(draft, 260), one_line(released, 260))))
    elif released != draft:
        lines.append(_indented("released  ", Text(one_line(released, 200))))
    return Group(*lines, Text())


def _indented(title: str, body: Text) -> RenderableType:
    grid = Table.grid()
    grid.add_row(Text(f"  {title}", "dim", no_wrap=True), body)
    return grid


# --- others -------------------------------------------------------------------------------------------


def summary(run: Summary) -> RenderableType:
    """Return the counts of a run as a table."""
    outcomes = ", ".join(f"{count} {name}" for name, count in run.outcomes.most_common()) or "none"
    most = ", ".join(f"{clean(name)} ({count})" for name, count in run.violated.most_common(5)) or "nothing"
    calls = count(run.calls, "generation")
    if run.forward_passes:
        calls += f", {count(run.forward_passes, 'forward pass', 'forward passes')}"
    rows = [
        ("outcomes", f"{outcomes}; {run.revised_share:.0%} revised"),
        ("violated most", most),
        ("calls", f"{calls}; {run.input_tokens:,} tokens read, {run.output_tokens:,} written"),
    ]
    if run.skipped:
        rows.append(("not answered", count(len(run.skipped), "row")))
    return table(rows)


def count(number: int, thing: str, things: str = "") -> str:
    """Return a number with its noun, such as "1 row" or "2,000 rows"; `things` is an irregular plural."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> RenderableType:
    """Return rows as aligned columns or, in a narrow terminal, cell below cell. The cells are cleaned."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headers))
    heads = [Text(name, "bold") for name in headers]
    cells = [[Text(clean(str(cell))) for cell in row] for row in rows]
    for position in range(len(cells[0]) if cells else len(heads)):
        made.add_column(heads[position] if heads else "", no_wrap=position == 0, overflow="fold")
    for row in cells:
        made.add_row(*row)
    return _Fitting(made, [heads, *cells] if heads else cells, whole=1, least=6)


class _Fitting:
    """A table that is shown as columns where these fit, otherwise as the cells of each row below each other.

    Args:
        columns: the table.
        rows: its cells, headers included.
        whole: how many of its columns, from the first, are never wrapped.
        least: the width that each other column needs, so that it does not wrap after every few letters.
    """

    def __init__(self, columns: Table, rows: Sequence[Sequence[Text]], *, whole: int, least: int) -> None:
        self._columns, self._rows = columns, rows
        wide = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
        wide[whole:] = [min(width, least) for width in wide[whole:]]
        self._least = sum(wide) + 2 * (len(wide) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= self._least:
            yield self._columns
            return
        for first, *others in self._rows:
            yield first
            yield from (Padding(cell, (0, 0, 0, 2)) for cell in others if cell)


def progress(tell: Callable[[str], None]) -> BaseCallbackHandler:
    """Return a callback handler that calls `tell` with each step of a request that begins."""
    from langchain_core.callbacks import BaseCallbackHandler

    from cai_graph.app.handlers import PROGRESS

    class Progress(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            if name == PROGRESS:
                tell(data["step"])

    return Progress()
