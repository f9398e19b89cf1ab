"""The records that a log holds: Trajectory, Comparison, Review and Feedback, and their JSON.

    Trajectory     one request
    ├── messages   the conversation before the answer, as Message
    ├── draft      Draft: the app's first answer
    ├── rounds     Round ── critique   Critique ── verdicts   Verdict, one for each principle or aim
    │                    └─ revisions  Revision, each with the Critique that judged it
    ├── calls      Call: every model call, with tokens, seconds and error
    └── outcome    Outcome, and `released`: the message that was released

    Comparison, Review, Feedback   appended later, each about one Trajectory

All are frozen. `encode` returns ASCII JSON bytes and `decode` reads them back without loss: everything
beyond ASCII is escaped, so that any text survives, even lone surrogates. NaN and infinity are rejected, since
JSON cannot express them. Nothing here imports a model library.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import msgspec

from cai_graph.errors import DataError
from cai_graph.parts import said_in, words_in

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

__all__ = [
    "SCHEMA_VERSION",
    "Block",
    "Call",
    "Cascaded",
    "Comparison",
    "ConstitutionRef",
    "Critique",
    "Draft",
    "Feedback",
    "Label",
    "Message",
    "Outcome",
    "Record",
    "Rejection",
    "Review",
    "Revision",
    "Round",
    "ToolCall",
    "Trajectory",
    "Verdict",
    "decode",
    "encode",
    "new_id",
    "now",
    "orders_disagree",
    "revision_at",
    "revision_name",
    "shown_of",
    "text_of",
]

SCHEMA_VERSION = 1
"""Version that `encode` writes. `decode` reads this one and every earlier one."""


class Label(StrEnum):
    """The three values of a verdict. UNREADABLE never counts as COMPLIES."""

    VIOLATES = "VIOLATES"
    COMPLIES = "COMPLIES"
    UNREADABLE = "UNREADABLE"


class Outcome(StrEnum):
    """How a request ended."""

    KEPT = "KEPT"
    """The draft violates nothing and was released."""
    REVISED = "REVISED"
    """An accepted revision was released, or a person's own answer (`released_from` is `human`)."""
    EXHAUSTED = "EXHAUSTED"
    """No answer was found to comply, and the best one was released all the same: because the policy is open,
    because a person released it, or because the request is benign and a refusal would be worse."""
    REFUSED = "REFUSED"
    """No answer could be trusted, and the constitution's refusal was released."""
    FAILED = "FAILED"
    """The request ended in an error, which `Trajectory.error` records."""
    UNJUDGED = "UNJUDGED"
    """No critic judged the answer, which was released as it was; `Trajectory.unjudged` records why."""


class Rejection(StrEnum):
    """Why a revision was not accepted. The list is closed."""

    EMPTY = "empty"
    """No text."""
    TRUNCATED = "truncated"
    """The model stopped at its token limit, or the provider's filter stopped it."""
    UNCHANGED = "unchanged"
    """The same text as the answer that it should improve."""
    NO_REWRITE = "no_rewrite"
    """A remark about the revision ("No revisions needed") instead of a revision."""
    BAD_SCHEMA = "bad_schema"
    """Does not parse as structured output of the draft's schema."""
    VIOLATES = "violates"
    """Still fails a principle that the draft failed, or a new one."""
    EVASIVE = "evasive"
    """Refuses or evades a benign request."""
    UNREADABLE = "unreadable"
    """The critic's verdict on it could not be read."""
    NOT_BEST = "not_best"
    """Acceptable, but another candidate of the round was better."""


class Base(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Base of every record: frozen, keyword arguments only, fields at their default are not in the JSON."""


def _current_version() -> int:
    # A factory, not a default: with omit_defaults, a default version would be missing from the JSON.
    return SCHEMA_VERSION


class ToolCall(Base, frozen=True, kw_only=True):
    """One call that a model asked an application to make."""

    name: str
    """Name of the tool."""
    args: dict[str, Any] = {}
    """Arguments, as the model gave them."""
    id: str | None = None
    """The provider's id, to which the tool's answer refers."""


class Message(Base, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    """`system`, `user`, `assistant`, `tool`, or another role that the application uses."""
    content: str | list[Any] = ""
    """Text, or a list of content parts (text, image, …) as LangChain holds them."""
    name: str | None = None
    """Name of the author, where the application gives one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Tool calls of an assistant message."""
    tool_call_id: str | None = None
    """On a `tool` message, the id of the call that it answers."""
    id: str | None = None
    """The message's id in the application."""


class Verdict(Base, frozen=True, kw_only=True):
    """A critic's judgement of one answer under one principle or one aim, or else of the whole answer."""

    label: Label
    """VIOLATES, COMPLIES or UNREADABLE."""
    principle: str | None = None
    """Id of the principle; None where the verdict is about an aim."""
    aim: str | None = None
    """The aim (`harmless`, `helpful`, …); None where the verdict is about a principle."""
    severity: int | None = None
    """1 (slight) to 5 (grave), where the critic gives one."""
    probability: float | None = None
    """P(VIOLATES) in [0, 1], where the model gives one; never copied from an aim to a principle."""
    reason: str | None = None
    """The critic's reason, or why no verdict could be read."""
    read_by: str | None = None
    """How it was obtained: structured, tool, json, line, logprob, probe, classifier, human, imported."""

    @property
    def about(self) -> str | None:
        """The principle's id or the aim that the verdict is about; None for the answer as a whole."""
        return self.principle or self.aim or None


class Critique(Base, frozen=True, kw_only=True):
    """A critic's reasoning and verdicts on one answer."""

    verdicts: tuple[Verdict, ...] = ()
    """One for each principle or aim that was judged."""
    reasoning: str = ""
    """The critic's free text; empty where the critic gives numbers only."""
    readings: dict[str, float] = {}
    """Probabilities in [0, 1] that a probe read, by head: `harm` and `evasion` of the answer, and `request`,
    that the request itself is unsafe."""
    benign_request: bool | None = None
    """Whether the critic judges the request to be benign; None where it judges no requests."""
    evasive: bool | None = None
    """Whether the critic judges the answer to be a refusal or an evasion; None where it does not."""
    critic: str | None = None
    """Name of the critic model, or of the probe."""
    cascade: Cascaded | None = None
    """Which critic of a cascade decided, and why; None where the critic is not a cascade."""

    @property
    def violated(self) -> tuple[str, ...]:
        """Ids of the principles, and aims, that the answer violates; no verdict on the whole answer."""
        failed = (verdict.about for verdict in self.verdicts if verdict.label is Label.VIOLATES)
        return tuple(about for about in failed if about is not None)


class Cascaded(Base, frozen=True, kw_only=True):
    """Which critic of a cascade decided, and why. The Critique that contains this is that critic's."""

    why: Literal["cleared", "above", "unreadable", "failed", "sample"]
    """`cleared`: the cheap critic decided. In all other cases the strong critic did, because the cheap one's
    probability was not below the threshold (`above`) or could not be read (`unreadable`), because the cheap
    one `failed`, or because the answer is in the `sample` that both always judge."""
    threshold: float
    """P(VIOLATES) in [0, 1] from which the strong critic is asked."""
    cheap: Critique | None = None
    """The cheap critic's Critique where the strong one decided; None where the cheap one failed."""


class Block(Base, frozen=True, kw_only=True):
    """A group of sentences of a draft that was judged while the app was still writing."""

    end: int
    """Where it ends in the draft's text, in characters from the text's start."""
    critique: Critique
    """The judgement of the draft's text up to `end`."""
    released: bool = False
    """Whether it was released at once. Released text is never taken back: revisions continue after it."""


class Draft(Base, frozen=True, kw_only=True):
    """The app's first answer."""

    answer: Message
    """The answer as a message."""
    truncated: bool = False
    """Whether the answer is incomplete: the model stopped at its token limit, or the provider's filter
    stopped it."""
    unfinished: bool = False
    """Whether this is only the beginning of the answer, since the app was still writing."""
    blocks: tuple[Block, ...] = ()
    """The blocks that were judged while the app wrote, in order; empty where the answer was judged whole."""

    @property
    def frozen(self) -> str:
        """The beginning of the answer's text that has been released already."""
        return text_of(self.answer)[: max((block.end for block in self.blocks if block.released), default=0)]


class Revision(Base, frozen=True, kw_only=True):
    """An answer written from a critique, with the critique that judged it in turn."""

    answer: Message
    """The answer as a message; empty where the model returned nothing."""
    from_draft: bool = True
    """Whether the reviser saw the answer that it should improve. False: it saw the request alone."""
    critique: Critique | None = None
    """The judgement of this answer; None where it was rejected without one, or under `sampled`."""
    accepted: bool = False
    """Whether this answer replaced the one before it."""
    rejection: Rejection | None = None
    """Why it was not accepted; None exactly when it was."""
    detail: str | None = None
    """Details of the rejection, such as the ids of the principles that still fail."""


class Round(Base, frozen=True, kw_only=True):
    """One critique and the candidate revisions written from it."""

    critique: Critique
    """The judgement of the answer that the round starts from."""
    of: str = "draft"
    """Name of that answer: `draft`, or `revision:ROUND:INDEX`, counted from 0."""
    revisions: tuple[Revision, ...] = ()
    """The candidates; at most one is accepted. Empty where no revision was needed."""


class Call(Base, frozen=True, kw_only=True):
    """One model call."""

    role: str
    """`draft`, `critique`, `revise`, `probe`, `compare`, `rate`."""
    model: str
    """Stable name of the model, such as `openai:gpt-5-mini` or `local:qwen2.5-1.5b`."""
    kind: Literal["generation", "forward"] = "generation"
    """`generation` writes a reply; `forward` writes none: it reads a hidden state or probabilities."""
    prompt_digest: str | None = None
    """First 16 hex digits of the sha256 of the messages sent; None in a log that redacts."""
    input_tokens: int | None = None
    """Tokens of the prompt, as the provider counts them."""
    cached_input_tokens: int | None = None
    """How many of `input_tokens` came from the provider's prefix cache."""
    output_tokens: int | None = None
    """Tokens of the reply."""
    seconds: float = 0.0
    """Wall time of the call, retries included."""
    error: str | None = None
    """Class and message of the exception, where the call failed."""


class ConstitutionRef(Base, frozen=True, kw_only=True):
    """A reference to the constitution of a record."""

    name: str
    """The constitution's name."""
    version: str
    """The constitution's version."""
    digest: str
    """sha256 over all parts of the constitution that are sent to a model."""


class Trajectory(Base, frozen=True, kw_only=True, tag_field="record", tag="trajectory"):
    """The immutable record of one request."""

    id: str
    """UUIDv7."""
    started_at: datetime
    """When the request arrived, UTC."""
    seconds: float
    """Wall time from the request to the record, without the time that a person took to decide."""
    mode: str
    """`enforce`: judged before release; `shadow`: released unchanged at once, and judged afterwards;
    `audit`: released while the app wrote it, and judged afterwards;
    `sampled`: the paper's data generation; `imported`: written elsewhere."""
    constitution: ConstitutionRef
    """The constitution under which the answers were judged."""
    outcome: Outcome
    """How the request ended."""
    messages: tuple[Message, ...] = ()
    """The conversation before the answer."""
    context: dict[str, str] = {}
    """Retrieved or other context that the critic saw, by key of the application's output."""
    draft: Draft | None = None
    """The app's first answer; None where the app failed."""
    rounds: tuple[Round, ...] = ()
    """Critiques and revisions, in order."""
    released: Message | None = None
    """The released message. Where an error was raised, what a stream had released before it, or None."""
    released_from: Literal["draft", "revision", "refusal", "human"] | None = None
    """Where the released message comes from."""
    unjudged: Literal["sample", "overload", "shutdown"] | None = None
    """Why no critic judged the answer (mode `shadow`): it is not in the `sample`, too many others were
    waiting (`overload`), or the process ended (`shutdown`). None where it was judged."""
    error: str | None = None
    """Class and message of the exception that ended the request."""
    calls: tuple[Call, ...] = ()
    """Every model call, in order of completion."""
    settings: dict[str, Any] = {}
    """The settings of the run, as JSON."""
    source: str | None = None
    """Key of the input, unique within a bulk run; a resumed run skips the keys that the log has."""
    metadata: dict[str, Any] = {}
    """The user's own metadata, as JSON. The trainers cap rows by its keys `user` and `tenant`."""
    tags: tuple[str, ...] = ()
    """The user's own tags."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of the record's schema."""

    @property
    def prompt(self) -> str:
        """Text of the last user message, or an empty string."""
        for message in reversed(self.messages):
            if message.role == "user":
                return text_of(message)
        return ""

    @property
    def violated(self) -> tuple[str, ...]:
        """Ids of the principles, and aims, that the draft violates; empty where it was not judged."""
        return self.rounds[0].critique.violated if self.rounds else ()


class Comparison(Base, frozen=True, kw_only=True, tag_field="record", tag="comparison"):
    """Two answers to one prompt, compared by a judge under one principle."""

    id: str
    """UUIDv7."""
    at: datetime
    """When it was made, UTC."""
    trajectory_id: str
    """Id of the Trajectory whose conversation both answers belong to."""
    answers: tuple[Message, Message]
    """Answer A and answer B."""
    origins: tuple[str, str]
    """Origin of each: `draft`, `revision:ROUND:INDEX`, `sample:INDEX:MODEL` or `human`."""
    judge: str
    """Name of the judge."""
    p_a: tuple[float | None, float | None]
    """P(A is better) in [0, 1] as the judge gave it, with A shown first and with B shown first; None
    where unreadable."""
    band: tuple[float, float] | None = None
    """The band to which the probabilities are clamped when they become a preference, where the judge reasoned
    first (Bai et al. 2022, section 4.1); None: they are not clamped."""
    method: Literal["logprob", "votes", "critic"] | None = None
    """Source of the probabilities: log-probabilities of the two labels (`logprob`), shares of sampled replies
    (`votes`), or a critic's verdicts on each answer alone (`critic`)."""
    votes: int | None = None
    """Replies sampled in each order, where the method is `votes`."""
    principle: str | None = None
    """Id of the principle under which the answers were compared."""
    constitution: ConstitutionRef | None = None
    """The constitution that the principle belongs to."""
    reasoning: tuple[str, str] | None = None
    """The judge's reasoning before its choice, in each order; None where it was not asked to reason."""
    critiques: tuple[Critique, ...] = ()
    """Critique of A and of B alone, where the method is `critic`."""
    calls: tuple[Call, ...] = ()
    """The judge's calls, and those that wrote an answer."""
    settings: dict[str, Any] = {}
    """The settings of the labelling, as JSON."""
    source: str | None = None
    """Key of the pair to compare; resumed labelling skips the keys that the log has."""
    metadata: dict[str, Any] = {}
    """The user's own metadata, as JSON."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of the record's schema."""

    @property
    def preference(self) -> float | None:
        """P(A is better) in [0, 1], clamped to the band and averaged over both orders; None if unreadable."""
        readable = [_clamped(p, self.band) for p in self.p_a if p is not None]
        return sum(readable) / 2 if len(readable) == 2 else None

    @property
    def orders_disagree(self) -> bool:
        """Whether the judge preferred a different answer when the two were shown in the other order."""
        return orders_disagree(*self.p_a)


def orders_disagree(first: float | None, second: float | None) -> bool:
    """Return whether a judge preferred a different answer when the two were shown in the other order.

    Args:
        first: P(A is better) with A shown first; None if unreadable.
        second: P(A is better) with B shown first; None if unreadable.

    >>> orders_disagree(0.9, 0.2), orders_disagree(0.9, 0.6), orders_disagree(0.9, None)
    (True, False, False)
    """
    return first is not None and second is not None and (first - 0.5) * (second - 0.5) < 0


def _clamped(p: float, band: tuple[float, float] | None) -> float:
    return p if band is None else min(max(p, band[0]), band[1])


class Review(Base, frozen=True, kw_only=True, tag_field="record", tag="review"):
    """A person's judgement of a Trajectory; appended, never edited."""

    id: str
    """UUIDv7."""
    at: datetime
    """When it was made, UTC."""
    trajectory_id: str
    """Id of the Trajectory that was judged."""
    reviewer: str
    """Name of the person."""
    decision: Literal["approve", "flip", "tie", "edit", "draft", "reject", "skip", "flag", "undo"]
    """The person's decision."""
    answer: Message | None = None
    """The person's own answer, where the decision is `edit`."""
    verdicts: tuple[Verdict, ...] = ()
    """The person's verdicts on the draft, by principle or aim."""
    note: str | None = None
    """The person's comment."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of the record's schema."""


class Feedback(Base, frozen=True, kw_only=True, tag_field="record", tag="feedback"):
    """The end user's signal on a released answer; appended, never edited."""

    id: str
    """UUIDv7."""
    at: datetime
    """When it arrived, UTC."""
    trajectory_id: str
    """Id of the Trajectory that it is about."""
    score: float
    """-1 (bad) to 1 (good)."""
    user: str | None = None
    """The user's id in the application."""
    note: str | None = None
    """The user's comment."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of the record's schema."""


Record = Trajectory | Comparison | Review | Feedback
"""Every kind of record in a log."""


# --- JSON ---------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version n -> the function that turns a record's JSON of version n into version n + 1."""


def encode(record: Record) -> bytes:
    """Return the record as one line of ASCII JSON, without a line end; `decode` reads it.

    Raises:
        DataError: a number is NaN or infinite, metadata is not JSON, or a field has the wrong type.
    """
    try:
        data = _encoder.encode(record)
        # msgspec writes text as UTF-8, NaN and infinity as null, and does not check the types of fields.
        # So its output is used only where it is ASCII and reads back as the same record.
        if data.isascii():
            again = _decoder.decode(data)
            if b"null" not in data or again == record:
                return data
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):  # Lone surrogates, too.
        pass
    try:
        data = json.dumps(
            msgspec.to_builtins(record), ensure_ascii=True, allow_nan=False, separators=(",", ":")
        ).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"record {record.id} cannot be written as JSON: {error}; "
            "keep NaN, infinity and objects other than JSON's out of metadata and content"
        ) from error
    try:
        decode(data)
    except DataError as error:
        raise DataError(f"record {record.id} could not be read again: {error}") from error
    return data


def decode(data: bytes | str) -> Record:
    """Return the record in `data`, one JSON object as `encode` writes it, of this or an earlier version.

    Raises:
        DataError: `data` is not JSON, not a record, or was written by a newer release.
    """
    try:
        return _current(_decoder.decode(data))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _decode_slowly(data)  # lone surrogates, an earlier version, or an error to explain


def _current(record: Record) -> Record:
    if record.schema != SCHEMA_VERSION:
        raise msgspec.ValidationError("another version")
    return record


def _decode_slowly(data: bytes | str) -> Record:
    try:
        builtins = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON record: {error}") from error
    if not isinstance(builtins, dict):
        raise DataError(f"a record is a JSON object, found {type(builtins).__name__}")
    version = builtins.get("schema", 1)
    if not isinstance(version, int) or version < 1:
        raise DataError(f"'schema' is the version of a record, a whole number from 1, found {version!r}")
    if version > SCHEMA_VERSION:
        raise DataError(
            f"schema version {version}, this release reads 1 to {SCHEMA_VERSION}; upgrade cai-graph"
        )
    while version < SCHEMA_VERSION:
        builtins = _UPGRADES[version](builtins)
        version += 1
    builtins["schema"] = SCHEMA_VERSION
    try:
        record: Record = msgspec.convert(builtins, Record)
        return record
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"not a record of this log: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# --- ids ----------------------------------------------------------------------------------------------


def new_id() -> str:
    """Return a new UUIDv7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(UUID(int=value))


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


# --- names of answers ---------------------------------------------------------------------------------

_REVISION = re.compile(r"revision:([0-9]+):([0-9]+)")


def revision_name(number: int, index: int) -> str:
    """Return the name of a revision: `revision:ROUND:INDEX`, counted from 0."""
    return f"revision:{number}:{index}"


def revision_at(name: str) -> tuple[int, int] | None:
    """Return the round and the index that a revision's name contains; None for any other name.

    >>> revision_at("revision:0:1"), revision_at("draft")
    ((0, 1), None)
    """
    found = _REVISION.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


# --- text of messages ---------------------------------------------------------------------------------


def text_of(message: Message | BaseMessage) -> str:
    """Return the text of a message as critics judge it: its text, then the words in its other parts."""
    shown = shown_of(message)
    if isinstance(message.content, str):
        return shown
    beside = filter(None, map(words_in, message.content))
    return "\n".join([shown, *beside] if shown else beside)


def shown_of(message: Message | BaseMessage) -> str:
    """Return the text of a message that its readers see: its string, or the text of its parts, joined."""
    content = message.content
    if isinstance(content, str):
        return content
    return "".join(said for part in content if (said := said_in(part)) is not None)
