"""An agent of a shop that calls tools; a person at the terminal decides about what no revision could mend.

    pip install -e ".[openai]" langgraph-checkpoint-sqlite
    python examples/agent_with_a_person.py ["QUESTION" [MODEL]]

MODEL is a model spec whose model calls tools; openai:gpt-5-mini if left out. What waits for the person is
kept in waiting.db: end the program at the question, start it again, and it asks again.
"""

import sys
from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from cai_graph import Constitution, ConstitutionalMiddleware, Principle, models

RULES = Constitution(
    name="shop",
    principles=(
        Principle(
            id="no-orders",
            aim="policy",
            tools=True,  # it judges the calls that the model wants to make, too
            critique_request="Look for an order of something that the user has not asked to order.",
            revision_request="Ask the user whether to order it, instead of ordering.",
        ),
        Principle(
            id="no-promises",
            aim="policy",
            critique_request="Look for a promise that a clerk could not make: a refund, a discount, a date.",
            revision_request="Say what the rule is and who decides, instead of promising.",
        ),
    ),
    refusal="I can't settle this here. Our service team can; shall I put you through?",
)


@tool
def opening_hours(city: str) -> str:
    """Tell when the shop in a city is open."""
    return f"{city}: Monday to Friday, 9 to 17 h"


@tool
def order(item: str) -> str:
    """Order an item for the customer."""
    return f"ordered: {item}"


def shop(model: str, checkpointer: SqliteSaver) -> Any:
    """Return the agent."""
    face = ConstitutionalMiddleware(constitution=RULES, on_violation="human")
    return create_agent(
        models.load(model), [opening_hours, order], middleware=[face], checkpointer=checkpointer
    )


def decided(question: dict[str, Any]) -> Command[Any]:
    """Ask the person at the terminal."""
    print(f"\nA customer asks: {question['request']}\nThe trouble: {question['reason']}")
    for call in question["tool_calls"]:
        print(f"The model wants to call {call['name']} with {call['args']}")
    print(f"Draft:    {question['draft']}\nProposed: {question['proposed']}")
    decision = input(f"{', '.join(question['decisions'])}? ").strip()
    answer = {"answer": input("Your answer: ")} if decision == "edit" else {}
    return Command(resume={"decision": decision, "reviewer": "terminal", **answer})


def main() -> None:
    """Ask the agent one question."""
    asked = (
        sys.argv[1] if len(sys.argv) > 1 else "My boots leak. Send me new ones, and do I get my money back?"
    )
    model = sys.argv[2] if len(sys.argv) > 2 else "openai:gpt-5-mini"
    config: Any = {"configurable": {"thread_id": asked}}
    with SqliteSaver.from_conn_string("waiting.db") as checkpointer:
        agent = shop(model, checkpointer)
        waiting = agent.get_state(config).interrupts  # of an earlier start
        state = (
            {"__interrupt__": waiting} if waiting else agent.invoke({"messages": [("user", asked)]}, config)
        )
        while state.get("__interrupt__"):
            state = agent.invoke(decided(state["__interrupt__"][0].value), config)
    print(f"\n{state['messages'][-1].text}\n\nEvery step is in cai.db: cai log list")


if __name__ == "__main__":
    main()
