"""A retrieval chain under a constitution: its answers are judged beside the pages that it was given.

    python examples/rag_chain.py ["QUESTION" [MODEL]]

MODEL is a model spec, such as openai:gpt-5-mini; the embedded local model if left out. The chain is plain
LangChain: a question goes in, and a dict with the question, the pages and the answer comes out. `guarded`
gives back the same dict.
"""

import re
import sys
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from cai_graph import constitutional, models

PAGES = [
    Document("Returns: unworn shoes come back within 30 days. We pay the postage inside the country."),
    Document("Opening hours: Monday to Friday from 9 to 17. On public holidays the shop is closed."),
    Document("Repairs: a new sole costs 45 and takes a week. Boots by other makers are welcome."),
]

PROMPT = ChatPromptTemplate.from_template(
    "Answer the customer of a shoe shop from these pages alone, in at most two sentences.\n\n"
    "{pages}\n\nQuestion: {question}"
)


def retrieve(given: dict[str, Any]) -> list[Document]:
    """Return the two pages that share most words with the question; your vector store goes here."""
    asked = _words(given["question"])
    return sorted(PAGES, key=lambda page: -len(asked & _words(page.page_content)))[:2]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def shop(model: BaseChatModel) -> Runnable[Any, Any]:
    """Return the chain as it was before: {question} -> {question, pages, answer}."""
    answer = PROMPT | model | StrOutputParser()
    return RunnablePassthrough.assign(pages=RunnableLambda(retrieve)) | RunnablePassthrough.assign(
        answer=answer
    )


def main() -> None:
    """Ask the shop one question."""
    question = sys.argv[1] if len(sys.argv) > 1 else "May I bring back boots that I wore for a week?"
    spec = sys.argv[2] if len(sys.argv) > 2 else "local"
    guarded = constitutional(
        shop(models.load(spec)),
        critic=spec,  # a chain has no model of its own that could judge, so it is named
        reviser=spec,
        context_keys=["pages"],  # the critic sees what the chain was given
    )
    out = guarded.invoke({"question": question})
    print(out["answer"])
    print(f"\n{len(out['pages'])} pages were read. How it came about: cai log list --limit 1")


if __name__ == "__main__":
    main()
