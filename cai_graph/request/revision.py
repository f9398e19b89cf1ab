"""Writes one candidate revision with the reviser, and rejects an unusable one before a critic judges it.

Rejected here are those that are empty, truncated, unchanged, mere remarks or of the wrong schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable

from cai_graph import local, models, prompts
from cai_graph.calls import Calls
from cai_graph.constitution import Principle
from cai_graph.critic import failed_principles
from cai_graph.messages import cut_short, from_langchain
from cai_graph.request.form import Form
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Progress, no_revision
from cai_graph.request.remarks import unwrapped
from cai_graph.request.request import Run
from cai_graph.trajectory import (
    Critique,
    Label,
    Message,
    Rejection,
    Revision,
    Round,
    ToolCall,
    text_of,
)

__all__ = ["candidate", "kept_calls"]


async def candidate(run: Run, calls: Calls, progress: Progress, index: int) -> Revision:
    """Return a candidate revision of the current round; under `sampled` a usable one is accepted unjudged.

    Args:
        run: the run of the request.
        calls: makes the call of the reviser, within the budget.
        progress: the draft and the rounds so far; the last round is the current one.
        index: the number of the candidate in its round, from 0.
    """
    plan, form, frozen = run.plan, run.request.form(), progress.draft.frozen
    opened = progress.rounds[-1]
    principles, standing = _addressed(plan, opened), progress.answer(opened.of)
    show_draft = index == 0  # other candidates are written without the draft: small models copy it
    last = index > 0 and index == plan.candidates - 1
    messages = prompts.rewrite_messages(
        principles,
        opened.critique.reasoning or _reasons(opened.critique),
        run.exchange(standing),
        show_draft=show_draft,
        decline=last and opened.critique.benign_request is False,
        said=frozen,
        schema=None if form is None else form.schema,
    )
    number = (len(progress.rounds) - 1) * plan.candidates + index
    reply = await _written(plan, calls, number, messages, form)
    answer = msgspec.structs.replace(from_langchain(reply), tool_calls=kept_calls(standing, principles))
    if (text := unwrapped(text_of(answer), text_of(standing))) != text_of(answer):
        answer = msgspec.structs.replace(answer, content=text)
    truncated = cut_short(reply) is not None
    rejection = no_revision(text_of(answer), text_of(standing), truncated=truncated)
    if frozen:
        answer = msgspec.structs.replace(answer, content=_continued(frozen, text_of(answer)))
        if rejection is None and text_of(answer) == text_of(standing):
            rejection = Rejection.UNCHANGED
    misfit: str | None = None
    if form is not None and rejection is None:
        try:
            answer = msgspec.structs.replace(answer, content=form.read(text_of(answer)))
        except ValueError as error:
            rejection, misfit = Rejection.BAD_SCHEMA, str(error)
    accepted = plan.settings.strategy == "sampled" and rejection is None
    return Revision(
        answer=answer, from_draft=show_draft, rejection=rejection, detail=misfit, accepted=accepted
    )


def kept_calls(standing: Message, failed: Sequence[Principle]) -> tuple[ToolCall, ...]:
    """Return the tool calls of a failed answer that its revision keeps.

    They are kept if the answer also has text and none of the principles in `failed` applies to tool calls. An
    answer of tool calls alone is replaced by the text of the revision.
    """
    if not text_of(standing) or any(principle.tools for principle in failed):
        return ()
    return standing.tool_calls


def _addressed(plan: Plan, opened: Round) -> list[Principle]:
    """Return the principles that a round's revisions must satisfy, in the wording that models receive."""
    if plan.settings.strategy == "sampled":
        return [plan.spoken[opened.critique.verdicts[0].principle or ""]]
    return failed_principles(opened.critique, plan.spoken)


def _reasons(critique: Critique) -> str:
    violated = (verdict for verdict in critique.verdicts if verdict.label is Label.VIOLATES)
    return "\n".join(verdict.reason for verdict in violated if verdict.reason)


def _continued(frozen: str, text: str) -> str:
    """Return the released blocks and the reviser's text after them, without its repetition of the blocks."""
    text = text.strip()
    repeated = r"\s+".join(re.escape(word) for word in frozen.split())
    if (found := re.match(repeated, text)) is not None:
        text = text[found.end() :].strip()
    return f"{frozen} {text}" if text else frozen


async def _written(
    plan: Plan, calls: Calls, number: int, messages: Sequence[BaseMessage], form: Form | None
) -> AIMessage:
    """Call the reviser; for a structured answer with the provider's structured output, if it supports that.

    If the provider rejects the schema, the reviser is called again for plain text.
    """
    plain = _sampling(plan, number)
    native = plain if form is None else models.writing(plan.reviser, form.schema)
    if form is None or native is plan.reviser:
        return await calls.generate("revise", plain, plan.reviser_name, messages)
    try:
        reply = await calls.generate("revise", native, plan.reviser_name, messages)
    except Exception as error:
        if (cut := models.cut_form(error)) is not None:
            return cut  # a revision that is rejected
        if not models.refuses_form(error):
            raise
        return await calls.generate("revise", plain, plan.reviser_name, messages)
    for call in reply.tool_calls[:1]:
        return AIMessage(json.dumps(call["args"]), response_metadata=reply.response_metadata)
    return reply


def _sampling(plan: Plan, number: int) -> Runnable[Any, Any]:
    # Only the embedded model is known to take a seed; each candidate needs its own, or all are alike.
    if plan.settings.seed is None or local.name_in(plan.reviser_name) is None:
        return plan.reviser
    return plan.reviser.bind(seed=plan.settings.seed + 1 + number)
