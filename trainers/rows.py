"""The rows: one frozen record for each kind of training data, in the trainers' conversational form.

    Provenance ── SFTRow          prompt → completion
               ├─ CritiqueRow     prompt, draft, principle → critique; then critique → revision
               ├─ PreferenceRow   prompt, chosen over rejected, with p_chosen and margin
               ├─ UnpairedRow     prompt, completion, desirable or not
               ├─ PromptRow       prompt alone
               ├─ CriticRow       answer under a principle → label
               ├─ PrivilegedRow   prompt, and a critique that only the teacher sees
               └─ RankedRow       prompt, with three answers in order

In its JSON a row says first where it came from, then, from `prompt` on, what it holds. Its id is a digest of
kind and content alone: rows of the same content have the same id, whatever log, order or engine made them.
Rows that say the opposite of each other (the same two answers the other way round, the other label of the
same answer) have the first half of their ids in common.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import msgspec
from xxhash import xxh3_64_digest, xxh3_128_digest

from trainers.ledger import Reason

__all__ = [
    "KINDS",
    "RANKS",
    "CriticRow",
    "CritiqueRow",
    "Dropped",
    "FunctionCall",
    "Kind",
    "PreferenceRow",
    "PrivilegedRow",
    "PromptRow",
    "Provenance",
    "RankedRow",
    "Row",
    "SFTRow",
    "Source",
    "Split",
    "ToolUse",
    "Turn",
    "UnpairedRow",
    "content_of",
    "encode_row",
    "line_of",
    "margin_of",
    "provenance_of",
    "read_row",
]

Kind = Literal["sft", "critique-sft", "preference", "unpaired", "prompts", "critic", "privileged", "ranked"]
Split = Literal["train", "test"]
Source = Literal[
    "human", "feedback", "comparison", "revision", "best-of-n", "draft", "critique", "imported", "prompt"
]
"""Which evidence a row rests on, the strongest first. Of rows of the same content the strongest's stays."""
RANKS: dict[Source, int] = {source: rank for rank, source in enumerate(get_args(Source))}
"""The place of each source among them."""


class Dropped(NamedTuple):
    """A trajectory, or a part of one, that gives no row."""

    reason: Reason
    """Out of the closed list."""


class _Base(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Settings shared by every row record."""


class FunctionCall(_Base, frozen=True, kw_only=True):
    """What a tool call asks for."""

    name: str
    """Name of the tool."""
    arguments: dict[str, Any]
    """Arguments, as the model gave them."""


class ToolUse(_Base, frozen=True, kw_only=True):
    """One call that an assistant turn makes, as chat templates read it."""

    id: str | None = None
    """The provider's id, which the tool's answer repeats."""
    type: Literal["function"] = msgspec.field(default_factory=lambda: "function")
    """Always `function`."""
    function: FunctionCall
    """The call."""


class Turn(_Base, frozen=True, kw_only=True):
    """One message of a conversation, as chat templates read it."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    """Text; empty where an assistant turn only calls tools."""
    name: str | None = None
    """Who spoke, where the application says so."""
    tool_calls: tuple[ToolUse, ...] = ()
    """Calls that an assistant turn makes."""
    tool_call_id: str | None = None
    """On a `tool` turn, the call that it answers."""


class Provenance(_Base, frozen=True, kw_only=True):
    """Where a row came from; each kind adds its content."""

    trajectory_id: str
    """The Trajectory that it was made of."""
    source: Source
    """Which evidence it rests on."""
    constitution: str
    """Digest of the constitution that judged."""
    judge: str
    """Who judged: the critic, the judge of a Comparison, the reviewer; empty where nobody is named."""
    principles: tuple[str, ...]
    """Ids of the principles (or aims) that the row speaks of; empty where it speaks of all."""
    id: str = ""
    """Digest of kind and content, 32 hex digits; set when the row is written."""
    split: Split | Literal[""] = ""
    """`train` or `test`; set when the row is written."""


class SFTRow(Provenance, frozen=True, kw_only=True):
    """An answer to imitate: an accepted revision, a kept draft, or a reviewer's own words."""

    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    completion: tuple[Turn, ...]
    """The answer, one assistant turn."""


class CritiqueRow(Provenance, frozen=True, kw_only=True):
    """One step of self-critique to imitate: the critique of a draft, or the revision that follows it."""

    prompt: tuple[Turn, ...]
    """The conversation, the draft, and the request for a critique; for a revision also the critique and the
    request to revise."""
    completion: tuple[Turn, ...]
    """The critique or the revision, one assistant turn."""
    step: Literal["critique", "revision"]
    """Which of the two."""


class PreferenceRow(Provenance, frozen=True, kw_only=True):
    """Two answers of which one is better."""

    p_chosen: float
    """P(chosen is better), above 0.5 and at most 1; a soft label for reward models and DPO."""
    margin: float
    """2 · p_chosen − 1, above 0 and at most 1: what reward training takes as the margin."""
    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    chosen: tuple[Turn, ...]
    """The better answer, one assistant turn."""
    rejected: tuple[Turn, ...]
    """The other one."""


class UnpairedRow(Provenance, frozen=True, kw_only=True):
    """One answer, desirable or not."""

    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    completion: tuple[Turn, ...]
    """The answer, one assistant turn."""
    label: bool
    """Whether it is desirable."""


class PromptRow(Provenance, frozen=True, kw_only=True):
    """A prompt for online training."""

    prompt: tuple[Turn, ...]
    """The conversation that asks."""


class CriticRow(Provenance, frozen=True, kw_only=True):
    """A verdict to imitate."""

    p_violates: float
    """P(VIOLATES) in [0, 1]; 0 or 1 where the critic gives no probability."""
    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    completion: tuple[Turn, ...]
    """The answer that is judged, one assistant turn."""
    principle: str
    """Id of the principle, or the aim."""
    violates: bool
    """Whether the answer violates it."""


class PrivilegedRow(Provenance, frozen=True, kw_only=True):
    """A prompt, and a critique that a teacher sees and the student does not."""

    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    privileged_context: str
    """The critique of the draft, in words."""


class RankedRow(Provenance, frozen=True, kw_only=True):
    """Three answers in order: the final revision over a middle one over the draft."""

    prompt: tuple[Turn, ...]
    """The conversation that asked."""
    reference: tuple[Turn, ...]
    """The best: the final revision."""
    chosen: tuple[Turn, ...]
    """The middle one: the revision before."""
    rejected: tuple[Turn, ...]
    """The draft."""


Row = SFTRow | CritiqueRow | PreferenceRow | UnpairedRow | PromptRow | CriticRow | PrivilegedRow | RankedRow
"""A row of any kind."""

KINDS: dict[Kind, type[Row]] = {
    "sft": SFTRow,
    "critique-sft": CritiqueRow,
    "preference": PreferenceRow,
    "unpaired": UnpairedRow,
    "prompts": PromptRow,
    "critic": CriticRow,
    "privileged": PrivilegedRow,
    "ranked": RankedRow,
}
"""The row type of each kind."""

_encoder = msgspec.json.Encoder()
_decoders: dict[Kind, msgspec.json.Decoder[Row]] = {
    kind: msgspec.json.Decoder(type_) for kind, type_ in KINDS.items()
}
_CONTENT = b',"prompt":['
_BETWEEN_ANSWERS = len(b',"chosen":,"rejected":')


def encode_row(kind: Kind, row: Row) -> tuple[bytes, bytes]:
    """Return a row's digest, 16 bytes, and its body: its JSON object without braces, id and split.

    The digest identifies content; it is no signature. Its first half is what rows have in common that say the
    opposite of each other.

    Raises:
        UnicodeEncodeError: a text holds a lone surrogate.
    """
    body = _encoder.encode(row)[1:-1]
    # Within a JSON string every quote is escaped, so what is found is the key itself.
    content = kind.encode() + body[body.index(_CONTENT) :]
    if isinstance(row, PreferenceRow):
        chosen, rejected = _encoder.encode(row.chosen), _encoder.encode(row.rejected)
        asked = content[: -len(chosen) - len(rejected) - _BETWEEN_ANSWERS]  # They stand behind the prompt.
        pair = chosen + rejected if chosen < rejected else rejected + chosen
        return xxh3_64_digest(asked + pair) + xxh3_64_digest(content), body
    if isinstance(row, UnpairedRow):
        asked = content[: content.rindex(b',"label":')]
        return xxh3_64_digest(asked) + xxh3_64_digest(content), body
    return xxh3_128_digest(content), body


def content_of(body: bytes) -> int:
    """Return where in an encoded row its content begins."""
    return body.index(_CONTENT)


def line_of(digest: bytes, body: bytes, split: Split) -> bytes:
    """Return an encoded row as one line of JSON, line end included."""
    return b'{"id":"%b",%b,"split":"%b"}\n' % (digest.hex().encode(), body, split.encode())


def provenance_of(line: bytes) -> bytes:
    """Return a row's line without its content: what is left is its Provenance."""
    return line[: line.index(_CONTENT)] + line[line.rindex(b',"split":"') :]


def read_row(kind: Kind, line: bytes) -> Row:
    """Return the row in one line of a dataset in the rows' own form.

    Raises:
        msgspec.MsgspecError: the line is no row of this kind.
    """
    return _decoders[kind].decode(line)


def margin_of(p_chosen: float) -> float:
    """Return the margin that belongs to P(chosen is better): 2p − 1."""
    return 2 * p_chosen - 1
