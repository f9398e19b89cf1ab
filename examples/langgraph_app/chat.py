"""A LangGraph app that opens in LangGraph's dev server, with a constitution around its model.

    pip install -e ".[openai]" "langgraph-cli[inmem]"
    cd examples/langgraph_app && CAI_MODEL=openai:gpt-5-mini langgraph dev

The node calls the guarded model as it would call the bare one. In the studio, and in every stream of the
graph, only what was released shows; the steps ("critiquing", "revising 1/2") come as custom events.
"""

import os
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from cai_graph import constitutional, models

model = constitutional(models.load(os.environ.get("CAI_MODEL", "local")))


class Conversation(TypedDict):
    """The app's state."""

    messages: Annotated[list[AnyMessage], add_messages]


async def answer(state: Conversation) -> dict[str, Any]:
    """Answer the last message."""
    return {"messages": [await model.ainvoke(state["messages"])]}


builder = StateGraph(Conversation)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
builder.add_edge("answer", END)
graph = builder.compile(name="chat")
