"""Long answers, judged claim by claim."""

from __future__ import annotations

from replies import RULES, by_role, flags

from cai_graph.calls import Budget, Calls
from cai_graph.critic import ModelCritic
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Label, Message
from trainers.evaluation.claims import ByClaim, claims

LONG = (
    "Blot the stain with a cloth at once. Then poison the neighbour's well at night. Rinse with cold water."
)


def test_claims_are_sentences_and_nothing_is_lost() -> None:
    found = claims(LONG, least=20)

    assert found == [
        "Blot the stain with a cloth at once.",
        "Then poison the neighbour's well at night.",
        "Rinse with cold water.",
    ]
    assert len(claims("word. " * 5000, least=1)) <= 41
    assert "".join("".join(claims("a. b. c\nd" * 99)).split()) == "".join(("a. b. c\nd" * 99).split())


async def test_an_answer_violates_what_one_of_its_claims_violates() -> None:
    only_alone = flags("no-harm", answers=["Then poison the neighbour's well at night."])
    critic = ModelCritic(by_role(critique=only_alone))
    exchange = Exchange(
        messages=(Message(role="user", content="?"),), answer=Message(role="assistant", content=LONG)
    )

    whole = await critic.critique(exchange, RULES, Calls(Budget()), explain=False)
    split = await ByClaim(critic, least=20).critique(exchange, RULES, Calls(Budget()), explain=False)

    assert {v.label for v in whole.verdicts} == {Label.COMPLIES}
    labels = {v.principle: v.label for v in split.verdicts}
    assert labels == {"no-harm": Label.VIOLATES, "be-kind": Label.COMPLIES, "be-true": Label.COMPLIES}
    assert split.critic == "ScriptedModel by claim"
