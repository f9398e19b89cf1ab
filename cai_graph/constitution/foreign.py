"""Converts the principle lists of other projects, such as LangChain's, to our own format."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cai_graph.constitution.principles import Principle
from cai_graph.constitution.source import Source, short
from cai_graph.errors import ConstitutionError

__all__ = ["own_format"]


def own_format(source: Source, name: str = "custom") -> Source:
    """Return a foreign principle list as a Source in our own format; return our own format unchanged."""
    if isinstance(source.data, list | tuple):
        lines = {("principles", *path): line for path, line in source.lines.items()}
        return replace(source, data={"name": name, "principles": _own_principles(source.data)}, lines=lines)
    if isinstance(source.data, Mapping) and "constitutions" in source.data:
        return _from_pairs(source, source.data, name)
    return source


def _from_pairs(source: Source, data: Mapping[str, Any], name: str) -> Source:
    """Convert {"constitutions": [{critic, revision}], "system_chat": [conversation, …]} to our own format."""
    pairs = data["constitutions"]
    if not isinstance(pairs, list):
        raise ConstitutionError(
            f"{source.at(('constitutions',))}: 'constitutions' holds {short(pairs)}; "
            "it should be a list of {critic, revision}"
        )
    own_name = {"critic": "critique_request", "revision": "revision_request"}
    principles = _own_principles(
        {own_name.get(key, key): value for key, value in pair.items()} if isinstance(pair, Mapping) else pair
        for pair in pairs
    )
    ids = {str(p.get("critique_request")): p["id"] for p in principles if isinstance(p, Mapping)}
    examples = _chat_examples(data.get("system_chat") or [], source, ids)
    lines = {
        ("principles", *(own_name.get(str(part), part) for part in path[1:])): line
        for path, line in source.lines.items()
        if path[:1] == ("constitutions",)
    }
    return replace(source, data={"name": name, "principles": principles, "examples": examples}, lines=lines)


def _own_principles(items: Iterable[object]) -> list[Any]:
    """Return the items with our field names; an item without an id gets one, and without an aim "general".

    An item that is not a principle is returned as it is; validation rejects it later.
    """
    principles: list[Any] = []
    taken: set[str] = set()
    for number, item in enumerate(items, 1):
        if isinstance(item, Principle):
            fields = item.model_dump()
        elif isinstance(item, Mapping):
            fields = dict(item)
        elif hasattr(item, "critique_request") and hasattr(item, "revision_request"):
            # LangChain's ConstitutionalPrinciple, recognised by its attributes, without importing LangChain.
            fields = {
                "name": getattr(item, "name", None),
                "critique_request": item.critique_request,
                "revision_request": item.revision_request,
            }
        else:
            principles.append(item)
            continue
        if "id" not in fields:
            words = re.findall(r"[a-z0-9]+", str(fields.pop("name", None) or "").lower())
            base = unique = "-".join(words)[:60].rstrip("-") or f"principle-{number:02d}"
            copy = 1
            while unique in taken:
                copy += 1
                unique = f"{base}-{copy}"
            fields["id"] = unique
        taken.add(str(fields["id"]))
        principles.append({"aim": "general", **fields})
    return principles


def _chat_examples(chats: Any, source: Source, ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return worked examples from conversations of six turns.

    The turns are request, draft, critique request, critique, revision request, revision. The format has no
    verdict: a draft that its revision hardly changes is taken to comply.

    Args:
        chats: conversations, each a list of six {role, content}.
        source: where they were read, for error messages.
        ids: principle ids by critique request.
    """
    examples: list[dict[str, Any]] = []
    try:
        for chat in chats:
            prompt, draft, request, critique, _, revision = (str(turn["content"]) for turn in chat[:6])
            alike = difflib.SequenceMatcher(None, draft.split(), revision.split(), autojunk=False).ratio()
            examples.append(
                {
                    "prompt": prompt,
                    "draft": draft,
                    "verdict": "COMPLIES" if alike >= 0.9 else "VIOLATES",
                    "critique": critique,
                    "revision": revision,
                    "principle": ids.get(request),
                }
            )
    except (TypeError, KeyError, ValueError) as error:
        raise ConstitutionError(
            f"{source.at(('system_chat', len(examples)))}: conversation {len(examples) + 1} of 'system_chat' "
            "is not six turns {role, content}: request, draft, critique request, critique, revision "
            "request, revision"
        ) from error
    return examples
