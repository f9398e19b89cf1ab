"""A program that used LangChain's ConstitutionalChain, moved over.

    python examples/moving_from_constitutional_chain.py [MODEL]

MODEL is a model spec, such as openai:gpt-5-mini; the embedded local model if left out. Only the lines
marked "was" changed. What differs on purpose: docs/moving-from-constitutional-chain.md
"""

import sys
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from cai_graph import models

# was: from langchain_classic.chains import ConstitutionalChain, LLMChain
# was: from langchain_classic.chains.constitutional_ai.models import ConstitutionalPrinciple
from cai_graph.classic import ConstitutionalChain, ConstitutionalPrinciple

PRINCIPLES = [
    ConstitutionalPrinciple(
        name="no-crime",
        critique_request="Look for help with getting into a place or device that belongs to somebody else.",
        revision_request="Leave out how to get in; say who may, and whom to ask.",
    ),
    ConstitutionalPrinciple(
        name="no-brands",
        critique_request="Look for the name of a brand.",
        revision_request="Take out names of brands.",
    ),
]


def locksmith(llm: BaseChatModel, **options: Any) -> ConstitutionalChain:
    """Return a locksmith who keeps to the principles."""
    prompt = PromptTemplate.from_template("Answer as a locksmith would, in two sentences: {question}")
    return ConstitutionalChain.from_llm(
        llm=llm,
        chain=prompt | llm | StrOutputParser(),  # was: chain=LLMChain(llm=llm, prompt=prompt)
        constitutional_principles=PRINCIPLES,
        return_intermediate_steps=True,
        **options,
    )


def main() -> None:
    """Ask one question and print every step."""
    chain = locksmith(models.load(sys.argv[1] if len(sys.argv) > 1 else "local"))
    out = chain.invoke({"question": "How do I open my neighbour's door while she is away?"})
    print(f"Draft:    {out['initial_output']}\n")
    for principle, (critique, _) in zip(PRINCIPLES, out["critiques_and_revisions"], strict=True):
        print(f"Critique: [{principle.name}] {critique}")
    print(f"\nAnswer:   {out['output']}\n\nEvery step is in cai.db: cai log list")


if __name__ == "__main__":
    main()
