"""How records look in a terminal, and that nothing in them acts on it."""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter

import msgspec
import pytest
from replies import RULES, by_role, flags
from rich.console import Console, RenderableType

from cai_graph import constitutional, show
from cai_graph.bulk import Summary
from cai_graph.trajectory import (
    Block,
    Call,
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Rejection,
    Revision,
    Round,
    Trajectory,
    Verdict,
    now,
)

HOSTILE = (
    "\x1b[2J\x1b]8;;http://evil\x07click\x1b]8;;\x07 \x9b31m [bold red]markup[/] :warning: "
    "\u202eright to left\u2066 \u200bhidden\ufeff \U000e0041tag \ud800lone \x7f\x08\x00 \rover\u2028line"
)


def rendered(renderable: RenderableType, *, color: bool = False, width: int = 100) -> str:
    file = io.StringIO()
    terminal = Console(
        file=file, width=width, force_terminal=color, highlight=False, markup=False, emoji=False
    )
    terminal.print(renderable)
    return file.getvalue()


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def trajectory(text: str = "", **fields: object) -> Trajectory:
    first = Critique(
        verdicts=(
            Verdict(label=Label.VIOLATES, principle="no-harm", severity=4, reason=f"it harms {text}"),
            Verdict(label=Label.COMPLIES, aim="helpful", probability=0.125),
            Verdict(label=Label.UNREADABLE, principle=f"be-true{text}", reason=f"said {text}"),
        ),
        reasoning=f"Because of this. {text}",
        readings={"harm": 0.91},
        critic=f"critic{text}",
    )
    revisions = (
        Revision(answer=said(f"No. {text}"), rejection=Rejection.EVASIVE, detail=f"evades {text}"),
        Revision(answer=said(f"Mix flour with salt, then bake it. {text}"), accepted=True),
    )
    values: dict[str, object] = {
        "id": "019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a",
        "started_at": now(),
        "seconds": 3.21,
        "mode": "enforce",
        "constitution": ConstitutionRef(name=f"rules{text}", version="1", digest="d" * 64),
        "outcome": Outcome.REVISED,
        "messages": (Message(role="user", content=f"How do I bake? {text}"),),
        "draft": Draft(answer=said(f"Mix flour with lye, then bake it. {text}"), truncated=True),
        "rounds": (Round(critique=first, revisions=revisions),),
        "released": revisions[1].answer,
        "released_from": "revision",
        "calls": (Call(role="draft", model="m", input_tokens=10, output_tokens=5),),
        "error": text or None,
        **fields,
    }
    return Trajectory(**values)  # type: ignore[arg-type]


def acts(text: str) -> list[str]:
    """The characters that could act on a terminal, line ends aside."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_a_trajectory_shows_draft_verdicts_critique_diff_outcome_calls_and_time() -> None:
    shown = rendered(show.trajectory(trajectory()))
    for part in (
        "How do I bake?",
        "draft, cut at its token limit",
        "VIOLATES",
        "no-harm",
        "severity 4 of 5",
        "aim: helpful",
        "p = 0.12",
        "UNREADABLE",
        "harm 0.91",
        "Because of this.",
        "revision 1.1: rejected, evasive (evades)",
        "Mix flour with [-lye,-] {+salt,+} then bake it.",
        "REVISED",
        "1 call, 10 tokens read, 5 written, 3.2 s, constitution rules 1",
        "019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a",
    ):
        assert part in shown


def test_a_verdict_on_nothing_in_particular_is_on_the_whole_answer() -> None:
    whole = Critique(verdicts=(Verdict(label=Label.COMPLIES, read_by="imported"),))
    shown = rendered(show.trajectory(trajectory(rounds=(Round(critique=whole),))))
    assert "COMPLIES  the whole answer" in shown


ID = "019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a"
LISTED = (ID, "2026-11-01 12:00", "EXHAUSTED", "How do I pick the lock of my own door without a key?")


@pytest.mark.parametrize("width", [20, 40, 54, 64])
def test_in_a_narrow_terminal_no_cell_of_a_table_is_lost(width: int) -> None:
    lines = rendered(show.table([LISTED], ("id", "at", "outcome", "prompt")), width=width).splitlines()
    assert max(map(len, lines)) <= width
    shown = "".join("".join(lines).split())
    letters = Counter("".join(LISTED).replace(" ", ""))
    assert letters <= Counter(shown)


def test_a_table_that_has_no_room_stands_cell_below_cell() -> None:
    made = show.table([LISTED, ("b", "c", "d", "e")], ("id", "at", "outcome", "prompt"))
    assert [line.rstrip() for line in rendered(made, width=40).splitlines()] == [
        "id",
        "  at",
        "  outcome",
        "  prompt",
        ID,
        "  2026-11-01 12:00",
        "  EXHAUSTED",
        "  How do I pick the lock of my own door",
        "  without a key?",
        "b",
        "  c",
        "  d",
        "  e",
    ]


def test_at_eighty_columns_a_table_is_a_table() -> None:
    made = show.table([LISTED], ("id", "at", "outcome", "prompt"))
    head, first, *_ = rendered(made, width=80).splitlines()
    assert head.split() == ["id", "at", "outcome", "prompt"]
    assert first.split()[:3] == [ID, "2026-11-01", "EXHAUSTED"]


@pytest.mark.parametrize("width", [30, 40, 80])
def test_a_verdict_is_cut_at_no_width(width: int) -> None:
    principle = "no-advice-on-the-law"
    verdict = Verdict(
        label=Label.UNREADABLE, principle=principle, severity=4, probability=0.5, reason="why " * 60
    )
    record = trajectory(rounds=(Round(critique=Critique(verdicts=(verdict,))),))
    shown = rendered(show.trajectory(record), width=width)
    for part in ("UNREADABLE", principle, "severity 4 of 5, p = 0.50"):
        assert part in shown
    assert shown.count("why") == 60
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("of", ["revision:#:#", "[withheld: redaction failed]"])
def test_a_record_whose_redaction_took_the_answers_name_for_text_is_shown(of: str) -> None:
    record = trajectory()
    again = Round(critique=record.rounds[0].critique, of=of)

    shown = rendered(show.trajectory(msgspec.structs.replace(record, rounds=(record.rounds[0], again))))

    assert "verdicts on the draft" in shown
    assert "verdicts on the answer" in shown


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_is_shown_by_its_name(outcome: Outcome) -> None:
    record = trajectory(outcome=outcome, released_from="refusal", released=said("I would rather not."))
    assert outcome.value in rendered(show.trajectory(record))
    assert outcome.value in rendered(show.brief(record))
    assert "I would rather not." in rendered(show.trajectory(record))


def test_a_request_that_failed_before_its_draft_is_shown() -> None:
    record = trajectory(draft=None, rounds=(), released=None, outcome=Outcome.FAILED, error="Timeout: late")
    assert "FAILED" in rendered(show.trajectory(record))
    assert "Timeout: late" in rendered(show.trajectory(record))
    assert "FAILED" in rendered(show.brief(record))


def test_hostile_text_never_reaches_the_terminal_as_anything_but_text() -> None:
    record = trajectory(HOSTILE)
    for view in (show.trajectory(record), show.brief(record, about="kind")):
        shown = rendered(view)
        assert acts(shown) == []
        assert ":warning:" in shown
    assert "[bold red]markup[/]" in " ".join(rendered(show.trajectory(record)).split())


def test_in_colour_only_our_own_styles_are_escapes() -> None:
    shown = rendered(show.trajectory(trajectory(HOSTILE)), color=True)
    assert acts(re.sub(r"\x1b\[[0-9;]*m", "", shown)) == []


def test_clean_spells_out_what_would_act_and_leaves_the_rest() -> None:
    assert show.clean("\x1b[31mred\x9b") == "\\x1b[31mred\\x9b"
    assert show.clean("a\u202eb\ud800\U000e0041") == "a\\u202eb\\ud800\\U000e0041"
    kept = "tab\tline\nnaïve Übung 你好 مرحبا 👩‍🚀 می‌خواهم"
    assert show.clean(kept) == kept
    assert show.clean("a\r\nb\rc") == "a\nb\\x0dc"


def test_word_diff_marks_what_went_and_what_came() -> None:
    assert show.word_diff("one two three four", "one two 3 four").plain == "one two [-three-] {+3+} four"
    assert show.word_diff("same", "same").plain == "same"
    assert show.word_diff("", "new").plain.strip() == "{+new+}"
    assert show.word_diff("old", "").plain.strip() == "[-old-]"


def test_word_diff_of_unlike_texts_is_two_blocks_and_no_confetti() -> None:
    before = "The quick fox of the wood jumps over a lazy dog"
    after = "I am sorry, the answer of a cautious model is over"
    assert show.word_diff(before, after).plain.count("[-") == 1


def test_word_diff_of_enormous_texts_shows_the_new_one_at_once() -> None:
    shown = show.word_diff("word " * 100_000, "other " * 100_000).plain
    assert shown.startswith("other other")
    assert "more characters" in shown


def test_word_diff_of_a_word_over_and_over_shows_the_new_text_at_once() -> None:
    after = "a b " * 500
    assert show.word_diff("a " * 1000, after).plain == after


def test_a_long_text_is_cut_on_screen_and_says_so() -> None:
    assert "9,980,000 more characters" in rendered(
        show.trajectory(trajectory(draft=Draft(answer=said("x" * 10_000_000)), rounds=()))
    )


def test_one_line_is_one_line_of_at_most_its_width() -> None:
    assert show.one_line("a\n b\t c", 10) == "a b c"
    assert show.one_line("x" * 50, 10) == "x" * 9 + "…"
    assert len(show.one_line("\x1b" * 50, 10)) == 10


def test_a_summary_says_what_a_run_came_to() -> None:
    summary = Summary()
    summary.add(trajectory())
    summary.add(trajectory(outcome=Outcome.KEPT, rounds=()))
    shown = rendered(show.summary(summary))
    assert "1 REVISED, 1 KEPT; 50% revised" in shown
    assert "no-harm (1)" in shown
    assert "2 generations; 20 tokens read, 10 written" in shown


async def test_the_steps_of_a_request_are_told_in_order() -> None:
    told: list[str] = []
    model = by_role(critique=flags("no-harm", answers=["the draft", "bad"]), revise="bad")
    app = constitutional(model, constitution=RULES, log=None)

    await app.ainvoke("hello", {"callbacks": [show.progress(told.append)]})

    assert told == ["drafting", "critiquing", "revising 1/2", "revising 2/2"]


def test_a_draft_that_left_in_part_or_before_its_verdict_says_so() -> None:
    half = Block(end=4, critique=Critique(), released=True)
    streamed = Draft(answer=said("Mix flour with lye."), unfinished=True, blocks=(half,))

    shown = " ".join(rendered(show.trajectory(trajectory(draft=streamed, mode="audit"))).split())

    assert (
        "draft, which the app had not finished, judged in blocks of which 4 characters left at once" in shown
    )
    assert "released before the verdict" in shown
