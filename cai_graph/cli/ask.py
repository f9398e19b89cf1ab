"""`cai ask`: sends one question through the graph, and prints the trajectory in a readable form."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_graph.cli.console import DEFAULT_LOG, err, group, out
from cai_graph.cli.options import (
    AsJson,
    Candidates,
    ConstitutionName,
    Critic,
    LogUrl,
    MaxRounds,
    MaxTokens,
    Model,
    OnError,
    OnUnreadable,
    OnViolation,
    Reviser,
    Seed,
    StrategyName,
    Strong,
    Threshold,
)
from cai_graph.cli.specs import critic_of, fetch, foreign, loaded

if TYPE_CHECKING:
    from cai_graph.chain import ConstitutionalChatModel

commands = group()


@commands.command(epilog='Example: cai ask "How do I sharpen a kitchen knife?" --model openai:gpt-5-mini')
def ask(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question to ask.")],
    model: Model = "local",
    critic: Critic = None,
    strong: Strong = None,
    threshold: Threshold = None,
    reviser: Reviser = None,
    constitution: ConstitutionName = "balanced",
    log: LogUrl = DEFAULT_LOG,
    strategy: StrategyName = "batched",
    max_rounds: MaxRounds = None,
    candidates: Candidates = None,
    on_violation: OnViolation = "closed",
    on_unreadable: OnUnreadable = "closed",
    on_error: OnError = "raise",
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question, and see its draft, verdicts, critique and revision."""
    from cai_graph import show
    from cai_graph.trajectory import encode

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        reason = "it is not UTF-8 in this locale; set LC_ALL=C.UTF-8"
        raise typer.BadParameter(reason, param_hint="PROMPT") from error
    guarded = guard(
        model,
        critic,
        reviser,
        constitution,
        log,
        strong=strong,
        threshold=threshold,
        max_tokens=max_tokens,
        seed=seed,
        strategy=strategy,
        max_rounds=max_rounds,
        candidates=candidates,
        on_violation=on_violation,
        on_unreadable=on_unreadable,
        on_error=on_error,
    )
    with closing(guarded), foreign(model):
        fetch(model, critic, strong, reviser)
        with err.status("drafting") as status:
            watch = show.progress(status.update)
            answered = asyncio.run(guarded.answered(prompt, {"callbacks": [watch]}))
    if as_json:
        typer.echo(encode(answered.trajectory).decode("ascii"))
    else:
        out.print(show.trajectory(answered.trajectory))


def guard(
    model: str,
    critic: str | None,
    reviser: str | None,
    constitution: str,
    log: str,
    *,
    strong: str | None = None,
    threshold: float | None = None,
    max_tokens: int | None,
    seed: int | None,
    **settings: Any,
) -> ConstitutionalChatModel:
    """Return the chat model of a spec under a constitution. No weights are downloaded."""
    from cai_graph import chain
    from cai_graph import constitution as constitutions
    from cai_graph.log import open_log

    rules = constitutions.load(constitution)
    guarded: ConstitutionalChatModel = chain.constitutional(
        loaded(model, seed=seed, max_tokens=max_tokens),
        constitution=rules,
        critic=critic_of(critic or model, strong, threshold),
        reviser=loaded(reviser or model, max_tokens=None if max_tokens is None else 2 * max_tokens),
        log=open_log(log),
        seed=seed,
        **settings,
    )
    return guarded


@contextlib.contextmanager
def closing(guarded: ConstitutionalChatModel) -> Iterator[None]:
    """Close the log when the block ends, which writes its pending records."""
    try:
        yield
    finally:
        if guarded.plan.log is not None:
            guarded.plan.log.close()
