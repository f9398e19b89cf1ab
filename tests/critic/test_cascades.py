"""The cascade: who is asked, what is recorded, what the user is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from replies import RULES, by_role, flags, verdicts
from repository import fenced, read_page
from wire import Reply, serving

from cai_graph import cascade, constitutional, models, open_log
from cai_graph.calls import Budget, Calls
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic import Critic, ModelCritic
from cai_graph.critic.cascades import Cascade, suspicion
from cai_graph.errors import BudgetExceeded, ConfigError
from cai_graph.prompts import Exchange
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Critique, Label, Message, Outcome, Trajectory, Verdict


class Cheap:
    """A critic that gives each answer a probability."""

    name = "cheap"
    candidates = 3
    splits = True

    def __init__(self, *said: float | Exception | None, label: Label = Label.COMPLIES) -> None:
        self.said = list(said)
        self.label = label
        self.explained: list[bool] = []

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        self.explained.append(explain)
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        aims = dict.fromkeys(principle.aim for principle in constitution)
        verdicts = tuple(Verdict(label=self.label, aim=aim, probability=said) for aim in aims)
        return Critique(verdicts=verdicts, critic=self.name)

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        raise AssertionError("a cheap critic does not discuss")


def exchange(answer: str = "hi") -> Exchange:
    return Exchange(
        messages=(Message(role="user", content="hello"),), answer=Message(role="assistant", content=answer)
    )


def strong(*violated: str) -> ScriptedModel:
    return ScriptedModel(replies=lambda messages: verdicts(*violated))


async def judged(critic: Critic, calls: Calls | None = None) -> Critique:
    return await critic.critique(exchange(), RULES, calls or Calls(Budget()), explain=True)


# --- who is asked -------------------------------------------------------------------------------------


async def test_the_strong_critic_is_not_asked_below_the_threshold() -> None:
    model = strong()
    found = await judged(cascade(Cheap(0.049), model, threshold=0.05))

    assert model.calls == []
    assert (found.critic, found.cascade and found.cascade.why) == ("cheap", "cleared")
    assert found.cascade is not None
    assert (found.cascade.threshold, found.cascade.cheap) == (0.05, None)


async def test_the_strong_critic_decides_from_the_threshold_on_and_the_record_holds_both() -> None:
    model = strong("be-kind")
    found = await judged(cascade(Cheap(0.05), model, threshold=0.05))

    assert len(model.calls) == 1
    assert found.critic == "ScriptedModel"
    assert [v.principle for v in found.verdicts if v.label is Label.VIOLATES] == ["be-kind"]
    assert found.cascade is not None
    assert found.cascade.why == "above"
    assert found.cascade.cheap == Critique(
        verdicts=tuple(
            Verdict(label=Label.COMPLIES, aim=aim, probability=0.05) for aim in ("harmless", "honest")
        ),
        critic="cheap",
    )


@pytest.mark.parametrize(
    ("cheap", "why"),
    [
        (Cheap(None), "unreadable"),
        (Cheap(0.0, label=Label.UNREADABLE), "unreadable"),
        (Cheap(OSError("engine gone")), "failed"),
        (Cheap(0.001, label=Label.VIOLATES), "above"),
    ],
    ids=["no probability", "unreadable", "failed", "says VIOLATES at a low probability"],
)
async def test_what_the_cheap_critic_cannot_clear_is_the_strong_ones(cheap: Cheap, why: str) -> None:
    model = strong()
    found = await judged(cascade(cheap, model, threshold=0.5))

    assert len(model.calls) == 1
    assert found.cascade is not None
    assert found.cascade.why == why
    assert (found.cascade.cheap is None) == (why == "failed")


async def test_a_cheap_critic_that_leaves_out_a_principle_clears_nothing() -> None:
    class Partial(Cheap):
        async def critique(
            self, exchange: Any, constitution: Constitution, calls: Any, *, explain: bool
        ) -> Any:
            return await super().critique(exchange, constitution.select(["no-harm"]), calls, explain=explain)

    model = strong("be-true")
    found = await judged(cascade(Partial(0.001), model, threshold=0.5))

    assert len(model.calls) == 1
    assert found.cascade is not None
    assert (found.cascade.why, found.cascade.cheap and found.cascade.cheap.verdicts[-1].label) == (
        "unreadable",
        Label.UNREADABLE,
    )


async def test_threshold_0_asks_both_about_everything() -> None:
    model = strong()
    found = await judged(cascade(Cheap(0.0), model, threshold=0))

    assert len(model.calls) == 1
    assert found.cascade is not None
    assert found.cascade.cheap is not None


async def test_a_sample_is_asked_about_whatever_the_cheap_one_says_and_a_seed_repeats_it() -> None:
    async def drawn(seed: int) -> list[str]:
        critic = cascade(Cheap(0.0), strong(), threshold=0.5, sample=0.3, seed=seed)
        found = [await judged(critic) for _ in range(200)]
        return [each.cascade.why for each in found if each.cascade is not None]

    first = await drawn(7)

    assert set(first) == {"cleared", "sample"}
    assert 30 <= first.count("sample") <= 90
    assert await drawn(7) == first
    assert await drawn(8) != first


async def test_the_cheap_critic_is_never_asked_to_explain() -> None:
    cheap = Cheap(0.9)
    await judged(cascade(cheap, strong(), threshold=0.5))

    assert cheap.explained == [False]


async def test_a_budget_that_ends_is_no_failure_of_the_cheap_critic() -> None:
    model = strong()
    with pytest.raises(BudgetExceeded):
        await judged(cascade(Cheap(BudgetExceeded("spent")), model, threshold=0.5))

    assert model.calls == []


def test_nothing_is_cleared_by_silence() -> None:
    assert suspicion(Critique()) is None


# --- in the graph -------------------------------------------------------------------------------------


def test_a_cleared_draft_costs_no_strong_call_and_a_suspect_one_is_judged_and_revised(tmp_path: Path) -> None:
    app = by_role(critique=AssertionError("the app's model does not judge"))
    model = by_role(critique=flags("no-harm"))
    with open_log(tmp_path / "log.db") as log:
        for probability in (0.01, 0.8, 0.01):  # the revision is cleared by the cheap one
            cheap = Cheap(probability, 0.01)
            guarded = constitutional(
                app,
                constitution=RULES,
                critic=cascade(cheap, model, threshold=0.5),
                log=log,
            )
            guarded.invoke("hello")
        log.flush()
        found = [t for t in log.read() if isinstance(t, Trajectory)]

    assert [t.outcome for t in found] == [Outcome.KEPT, Outcome.REVISED, Outcome.KEPT]
    kept, revised, _ = found
    assert kept.rounds[0].critique.critic == "cheap"
    assert revised.rounds[0].critique.critic == "ScriptedModel"
    assert revised.rounds[0].revisions[0].critique is not None
    assert revised.rounds[0].revisions[0].critique.critic == "cheap"
    assert revised.settings["critic"] == "cascade(cheap, ScriptedModel, 0.5)"
    assert len(model.calls) == 1


def test_strategy_parallel_is_refused() -> None:
    critic = cascade(Cheap(0.1), strong(), threshold=0.5)
    with pytest.raises(ConfigError, match="judges everything at once"):
        constitutional(strong(), critic=critic, strategy="parallel", log=None)


def test_strategy_sampled_is_refused_where_the_critic_that_decides_writes_no_prose() -> None:
    class Silent(Cheap):
        writes = False

    fine = cascade(Silent(0.1), Cheap(0.1), threshold=0.5)
    constitutional(strong(), critic=fine, strategy="sampled", log=None)
    silent = cascade(Cheap(0.1), Silent(0.1), threshold=0.5)
    for critic in (Silent(0.1), silent, cascade(Cheap(0.1), silent, threshold=0.9)):
        with pytest.raises(ConfigError, match="writes no prose, which 'sampled' revises by"):
            constitutional(strong(), critic=critic, strategy="sampled", log=None)


async def test_strategy_sampled_is_the_strong_critics() -> None:
    critic = cascade(Cheap(0.1), ScriptedModel(replies=["Fine.\nVerdict: COMPLIES"]), threshold=0.5)
    found = await critic.discuss(exchange(), RULES["be-kind"], RULES, Calls(Budget()))

    assert found.critic == "ScriptedModel"


# --- probabilities over the wire ----------------------------------------------------------------------


def _scored(label: str, probability: float, identifier: str) -> Reply:
    """A critic's reply with log-probabilities at the label, as an OpenAI-compatible server gives them."""
    other = "VIOLATES" if label == "COMPLIES" else "COMPLIES"
    p_label = 1 - probability if label == "COMPLIES" else probability
    text = verdicts(*([identifier] if label == "VIOLATES" else []), ids=[identifier])
    before, after = text.split(f'"{label}"')
    tokens = [before + '"', label, '"' + after]
    tops: list[list[dict[str, Any]]] = [
        [],
        [
            {"token": label, "logprob": math.log(p_label), "bytes": None},
            {"token": other, "logprob": math.log(1 - p_label), "bytes": None},
        ],
        [],
    ]
    content = [
        {"token": token, "logprob": -0.1, "bytes": None, "top_logprobs": top}
        for token, top in zip(tokens, tops, strict=True)
    ]
    return Reply(text, logprobs=content)


@pytest.mark.parametrize(("probability", "asked"), [(0.02, 0), (0.3, 1)])
async def test_a_chat_model_is_asked_for_log_probabilities_and_clears_by_them(
    probability: float, asked: int
) -> None:
    one = RULES.select(["be-kind"])
    model = strong()
    with serving(lambda body: _scored("COMPLIES", probability, "be-kind")) as server:
        critic = cascade(server.spec, model, threshold=0.1)
        found = await critic.critique(exchange(), one, Calls(Budget()), explain=True)

    assert [(body["logprobs"], body["top_logprobs"]) for body in server.requests] == [(True, 5)]
    assert len(model.calls) == asked
    cheap = found if asked == 0 else found.cascade and found.cascade.cheap
    assert cheap
    assert cheap.verdicts[0].probability == pytest.approx(probability)


def test_a_users_own_setting_of_log_probabilities_stays() -> None:
    with serving(lambda body: "") as server:
        critic = cascade(models.load(server.spec, logprobs=True, top_logprobs=2), strong(), threshold=0.1)

    assert isinstance(critic, Cascade)
    assert isinstance(critic.cheap, ModelCritic)
    assert getattr(critic.cheap.model, "top_logprobs", None) == 2


def test_a_cheap_model_without_probabilities_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives no log-probabilities, so it could clear nothing"):
        cascade(strong(), strong(), threshold=0.1)


@pytest.mark.parametrize("bad", [{"threshold": 1.5}, {"threshold": True}, {"threshold": 0.1, "sample": -1}])
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is a number from 0 to 1"):
        cascade(Cheap(0.1), strong(), **bad)


def test_a_redaction_reaches_what_the_cheap_critic_said(tmp_path: Path) -> None:
    from cai_graph.log import redact_texts
    from cai_graph.trajectory import Cascaded, ConstitutionRef, Round, encode, new_id, now

    cheap = Critique(verdicts=(), reasoning="the secret is swordfish", critic="cheap")
    critique = Critique(cascade=Cascaded(why="above", threshold=0.1, cheap=cheap), critic="strong")
    trajectory = Trajectory(
        id=new_id(),
        started_at=now(),
        seconds=1.0,
        mode="enforce",
        constitution=ConstitutionRef(name="rules", version="1", digest="0" * 64),
        outcome=Outcome.KEPT,
        rounds=(Round(critique=critique),),
    )
    redacted = redact_texts(lambda text: text.replace("swordfish", "…"))(trajectory)

    assert b"swordfish" not in encode(redacted)
    assert isinstance(redacted, Trajectory)
    assert redacted.rounds[0].critique.cascade is not None
    assert redacted.rounds[0].critique.cascade.why == "above"


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = read_page("cascade.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    names: dict[str, Any] = {}
    for block in fenced(page, "python"):
        exec(block, names)

    assert names["guarded"].plan.critic.name == "cascade(local:qwen2.5-1.5b, openai:gpt-5-mini, 0.03)"


def test_an_answer_is_as_suspect_as_its_worst_verdict_says() -> None:
    said = [Verdict(label=Label.COMPLIES, aim=aim, probability=p) for aim, p in (("a", 0.4), ("b", 0.1))]
    assert suspicion(Critique(verdicts=tuple(said))) == 0.4


async def test_the_strong_critic_explains_what_it_condemns_where_that_is_asked_for() -> None:
    cheap, condemns = Cheap(0.9), Cheap(0.9)
    await judged(cascade(cheap, condemns, threshold=0.5))

    assert (cheap.explained, condemns.explained) == ([False], [True])


async def test_a_cheap_critic_that_is_set_up_wrong_is_no_failure_of_one_request() -> None:
    with pytest.raises(ConfigError, match="no such model"):
        await judged(cascade(Cheap(ConfigError("no such model")), strong(), threshold=0.5))


def test_as_many_revisions_are_tried_as_the_strong_critic_judges() -> None:
    class Strong(Cheap):
        candidates = 5

    assert cascade(Cheap(0.1), Strong(0.1), threshold=0.5).candidates == 5
