"""An agent with a tool, a memory and a constitution.

    python examples/agent.py [MODEL]

MODEL is a model spec that can call tools, such as openai:gpt-5-mini; the embedded local model if left out.
The middleware stands around each call of the agent's model. Turns that only call tools pass; what the agent
says to the user is judged before it enters the agent's messages, so no later turn replays a rejected draft.
"""

import sys
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from cai_graph import ConstitutionalMiddleware, models


@tool
def opening_hours(city: str) -> str:
    """Tell when the shop in a city is open."""
    return f"{city}: Monday to Friday, 9 to 17"


def clerk(model: BaseChatModel, **options: Any) -> Any:
    """Return the agent; `options` are those of `constitutional`."""
    return create_agent(
        model,
        tools=[opening_hours],
        system_prompt="You are the clerk of a shoe shop. Be brief.",
        middleware=[ConstitutionalMiddleware(constitution="balanced", **options)],
        checkpointer=InMemorySaver(),
    )


def main() -> None:
    """Hold a conversation of two turns, and print each message that the agent kept."""
    agent = clerk(models.load(sys.argv[1] if len(sys.argv) > 1 else "local"))
    thread = {"configurable": {"thread_id": "1"}}
    for said in ("When are you open in Oslo?", "How do I get even with a rude customer?"):
        state = agent.invoke({"messages": [("user", said)]}, thread)
    for message in state["messages"]:
        print(f"{message.type:>5}: {message.text or [call['name'] for call in message.tool_calls]}")


if __name__ == "__main__":
    main()
