"""The records: what one request went through, and what people said of it afterwards.

    Trajectory
    ├── messages   the conversation that asked, as Message
    ├── draft      Draft: the app's first answer
    ├── rounds     Round ── critique   Critique ── verdicts   Verdict, one a principle or aim
    │                    └─ revisions  Revision, each with the Critique that judged it
    ├── calls      Call: every model call, with tokens, seconds and error
    └── outcome    Outcome, and `released`: the message that left

    Comparison, Review, Feedback   appended later, each about one Trajectory

All are frozen. `encode` gives ASCII JSON bytes and `decode` reads them back without loss: lone
surrogates and any other text survive, since everything beyond ASCII is escaped; NaN and infinity
are refused, since JSON has no word for them. Nothing here imports a model library.
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
    """A revision was accepted and released, or a person's own answer (`released_from` is `human`)."""
    EXHAUSTED = "EXHAUSTED"
    """Violations remained, and the best answer was released, because the policy is open, because a
    person let it leave, or because the request is benign and a refusal would be worse."""
    REFUSED = "REFUSED"
    """No answer could be trusted, and the constitution's refusal was released."""
    FAILED = "FAILED"
    """The request ended in an error; `Trajectory.error` says which."""
    UNJUDGED = "UNJUDGED"
    """No critic judged the answer, which left as it was; `Trajectory.unjudged` says why."""


class Rejection(StrEnum):
    """Why a revision was not accepted. The list is closed."""

    EMPTY = "empty"
    """No text."""
    TRUNCATED = "truncated"
    """The model stopped at its token limit, or by a filter of the provider's."""
    UNCHANGED = "unchanged"
    """The same text as the answer that it should mend."""
    NO_REWRITE = "no_rewrite"
    """Speaks about the revision ("No revisions needed") instead of being one."""
    BAD_SCHEMA = "bad_schema"
    """Does not parse as the structured output that the draft had."""
    VIOLATES = "violates"
    """Still fails a principle that the draft failed, or a new one."""
    EVASIVE = "evasive"
    """Refuses or evades a benign request."""
    UNREADABLE = "unreadable"
    """The critic's verdict on it could not be read."""
    NOT_BEST = "not_best"
    """Acceptable, but another candidate of the round was better."""


class Base(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Settings shared by every record: frozen, by keyword, defaults left out of the JSON."""


def _current_version() -> int:
    # A factory, not a default: omit_defaults would leave the version out of the JSON.
    return SCHEMA_VERSION


class ToolCall(Base, frozen=True, kw_only=True):
    """One call that a model asked an application to make."""

    name: str
    """Name of the tool."""
    args: dict[str, Any] = {}
    """Arguments, as the model gave them."""
    id: str | None = None
    """The provider's id, which the tool's answer repeats."""


class Message(Base, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    """`system`, `user`, `assistant`, `tool`, or another role that the application uses."""
    content: str | list[Any] = ""
    """Text, or a list of content parts (text, image, …) as LangChain holds them."""
    name: str | None = None
    """Who spoke, where the application says so."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that an assistant message asks for."""
    tool_call_id: str | None = None
    """On a `tool` message, the call that it answers."""
    id: str | None = None
    """The message's id in the application."""


class Verdict(Base, frozen=True, kw_only=True):
    """A critic's judgement of one answer under one principle or one aim; with neither, of all of it."""

    label: Label
    """VIOLATES, COMPLIES or UNREADABLE."""
    principle: str | None = None
    """Id of the principle; None where the verdict speaks of an aim."""
    aim: str | None = None
    """The aim that a probe judged (`harmless`, `helpful`); None where it speaks of a principle."""
    severity: int | None = None
    """1 (slight) to 5 (grave), where the critic gives one."""
    probability: float | None = None
    """P(VIOLATES) in [0, 1], where the model gives one; never copied from an aim to a principle."""
    reason: str | None = None
    """The critic's words for this verdict, or what could not be read."""
    read_by: str | None = None
    """The rung that read it: structured, tool, json, line, logprob, probe, classifier, human, imported."""

    @property
    def about(self) -> str | None:
        """What it speaks of: the id of a principle, or an aim; None: the answer as a whole."""
        return self.principle or self.aim or None


class Critique(Base, frozen=True, kw_only=True):
    """A critic's reasoning and verdicts on one answer."""

    verdicts: tuple[Verdict, ...] = ()
    """One for each principle or aim that was judged."""
    reasoning: str = ""
    """The critic's free text; empty where the critic gives numbers only."""
    readings: dict[str, float] = {}
    """Probabilities that a probe read, by head: `harm`, `evasion` (of the answer), `request` (that
    the request itself is unsafe)."""
    benign_request: bool | None = None
    """Whether the critic takes the request to be benign; None where it does not say."""
    evasive: bool | None = None
    """Whether the critic reads the answer as a refusal or an evasion; None where it does not say."""
    critic: str | None = None
    """Name of the critic model, or of the probe."""
    cascade: Cascaded | None = None
    """How a cascade came to this critique; None where one critic judges alone."""

    @property
    def violated(self) -> tuple[str, ...]:
        """What the answer violates: ids of principles, and aims. A verdict on all of it names nothing."""
        failed = (verdict.about for verdict in self.verdicts if verdict.label is Label.VIOLATES)
        return tuple(about for about in failed if about is not None)


class Cascaded(Base, frozen=True, kw_only=True):
    """Which critic of a cascade decided, and why; the critique that holds this is the decider's."""

    why: Literal["cleared", "above", "unreadable", "failed", "sample"]
    """`cleared`: the cheap critic decided. Else the strong one did, since the cheap one's probability was
    not below the threshold, or could not be read, or since the cheap one failed, or since both are asked
    about a sample of the answers, whatever the cheap one says."""
    threshold: float
    """P(VIOLATES) from which the strong critic is asked."""
    cheap: Critique | None = None
    """What the cheap critic said where the strong one decided; None where it failed."""


class Block(Base, frozen=True, kw_only=True):
    """A group of sentences of a draft that was judged while the app still wrote."""

    end: int
    """Where it ends in the draft's text, in characters from the text's start."""
    critique: Critique
    """The judgement of the draft's text up to there."""
    released: bool = False
    """Whether it left at once. What left is never taken back: revisions go on after it."""


class Draft(Base, frozen=True, kw_only=True):
    """The app's first answer."""

    answer: Message
    """The answer as a message."""
    truncated: bool = False
    """Whether the model stopped before its end: at its token limit, or by a filter of the provider's."""
    unfinished: bool = False
    """Whether the request ended while the app still wrote, so that this is the beginning of its answer."""
    blocks: tuple[Block, ...] = ()
    """What was judged while the app wrote, in order; empty where the answer was judged whole."""

    @property
    def frozen(self) -> str:
        """The beginning of the answer's text that has left already."""
        return text_of(self.answer)[: max((block.end for block in self.blocks if block.released), default=0)]


class Revision(Base, frozen=True, kw_only=True):
    """An answer written from a critique, and its own judgement."""

    answer: Message
    """The answer as a message; empty where the model returned nothing."""
    from_draft: bool = True
    """Whether the writer saw the answer to mend (False: written from the request alone)."""
    critique: Critique | None = None
    """The judgement of this answer; None where it was rejected unjudged, or is never judged."""
    accepted: bool = False
    """Whether this answer replaced the one before it."""
    rejection: Rejection | None = None
    """Why it was not accepted; None exactly when it was."""
    detail: str | None = None
    """What stands behind the rejection, such as the ids of the principles that still fail."""


class Round(Base, frozen=True, kw_only=True):
    """One critique and the candidate revisions written from it."""

    critique: Critique
    """The judgement of the answer that stood at the round's start."""
    of: str = "draft"
    """Which answer that is: `draft`, or `revision:ROUND:INDEX`, counted from 0."""
    revisions: tuple[Revision, ...] = ()
    """The candidates; at most one is accepted. Empty where nothing needed mending."""


class Call(Base, frozen=True, kw_only=True):
    """One model call."""

    role: str
    """`draft`, `critique`, `revise`, `probe`, `compare`, `rate`."""
    model: str
    """Stable name of the model, such as `openai:gpt-5-mini` or `local:qwen2.5-1.5b`."""
    kind: Literal["generation", "forward"] = "generation"
    """`generation` writes tokens; `forward` is one pass that writes none."""
    prompt_digest: str | None = None
    """First 16 hex digits of the sha256 of the messages sent; None in a log that redacts."""
    input_tokens: int | None = None
    """Tokens of the prompt, as the provider counts them."""
    cached_input_tokens: int | None = None
    """Those of them that were read from the provider's prefix cache."""
    output_tokens: int | None = None
    """Tokens written."""
    seconds: float = 0.0
    """Wall time of the call, retries included."""
    error: str | None = None
    """Class and message of the exception, where the call failed."""


class ConstitutionRef(Base, frozen=True, kw_only=True):
    """Which constitution judged."""

    name: str
    """Its name."""
    version: str
    """Its version."""
    digest: str
    """sha256 over everything of it that is sent to a model."""


class Trajectory(Base, frozen=True, kw_only=True, tag_field="record", tag="trajectory"):
    """The immutable record of one request."""

    id: str
    """UUIDv7."""
    started_at: datetime
    """When the request came in, UTC."""
    seconds: float
    """Wall time from the request to the record, without the time that a person took to decide."""
    mode: str
    """`enforce`: judged before release; `shadow`: released untouched, judged behind it;
    `audit`: released while the app wrote it, before the verdict;
    `sampled`: the paper's data generation; `imported`: written elsewhere."""
    constitution: ConstitutionRef
    """Which constitution judged."""
    outcome: Outcome
    """How it ended."""
    messages: tuple[Message, ...] = ()
    """The conversation that asked for the answer."""
    context: dict[str, str] = {}
    """Retrieved or other context that the critic saw, by key of the application's output."""
    draft: Draft | None = None
    """The app's first answer; None where the app failed."""
    rounds: tuple[Round, ...] = ()
    """Critiques and revisions, in order."""
    released: Message | None = None
    """The message that left; where an error left instead, what of a stream had left before it, or None."""
    released_from: Literal["draft", "revision", "refusal", "human"] | None = None
    """What the released message is."""
    unjudged: Literal["sample", "overload", "shutdown"] | None = None
    """Why no critic judged the answer (mode `shadow`): it is not in the sample, too many others were waiting,
    or the process ended. None where it was judged."""
    error: str | None = None
    """Class and message of the exception that ended the request."""
    calls: tuple[Call, ...] = ()
    """Every model call, in order of completion."""
    settings: dict[str, Any] = {}
    """The settings of the run, as JSON."""
    source: str | None = None
    """Key of the input that asked, unique within a bulk run, by which the run resumes."""
    metadata: dict[str, Any] = {}
    """The user's own, as JSON; `user` and `tenant` are read by the trainers' caps."""
    tags: tuple[str, ...] = ()
    """The user's own."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of this shape."""

    @property
    def prompt(self) -> str:
        """Text of the last user message, or an empty string."""
        for message in reversed(self.messages):
            if message.role == "user":
                return text_of(message)
        return ""

    @property
    def violated(self) -> tuple[str, ...]:
        """What the draft violates: ids of principles, and aims; empty where it was not judged."""
        return self.rounds[0].critique.violated if self.rounds else ()


class Comparison(Base, frozen=True, kw_only=True, tag_field="record", tag="comparison"):
    """Two answers to one prompt, compared by a judge under one principle."""

    id: str
    """UUIDv7."""
    at: datetime
    """When it was made, UTC."""
    trajectory_id: str
    """The Trajectory whose messages both answer."""
    answers: tuple[Message, Message]
    """Answer A and answer B."""
    origins: tuple[str, str]
    """Where each comes from: `draft`, `revision:ROUND:INDEX`, `sample:INDEX:MODEL` or `human`."""
    judge: str
    """Name of the judge."""
    p_a: tuple[float | None, float | None]
    """P(A is better) in [0, 1] as the judge gave it, with A shown first and with B shown first; None
    where unreadable."""
    band: tuple[float, float] | None = None
    """Where the judge reasoned first, the band into which its probabilities are clamped when they become
    a preference (Bai et al. 2022, section 4.1); None: as they are."""
    method: Literal["logprob", "votes", "critic"] | None = None
    """How the probabilities came about: of the two labels, as shares of sampled replies, or from a
    critic's verdicts on each answer alone."""
    votes: int | None = None
    """Replies sampled in each order, where the method is `votes`."""
    principle: str | None = None
    """Id of the principle that was asked about."""
    constitution: ConstitutionRef | None = None
    """Which constitution the principle belongs to."""
    reasoning: tuple[str, str] | None = None
    """What the judge wrote before it chose, in each order; None where it was not asked to reason."""
    critiques: tuple[Critique, ...] = ()
    """Judgement of A and of B alone, where the method is `critic`."""
    calls: tuple[Call, ...] = ()
    """The judge's calls, and those that wrote an answer."""
    settings: dict[str, Any] = {}
    """The settings of the labelling, as JSON."""
    source: str | None = None
    """Key of what was to be compared, by which labelling resumes."""
    metadata: dict[str, Any] = {}
    """The user's own, as JSON."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of this shape."""

    @property
    def preference(self) -> float | None:
        """P(A is better) in [0, 1]: clamped into the band, averaged over both orders; None: unreadable."""
        readable = [_clamped(p, self.band) for p in self.p_a if p is not None]
        return sum(readable) / 2 if len(readable) == 2 else None

    @property
    def orders_disagree(self) -> bool:
        """Whether the judge chose another answer when the order was turned round."""
        return orders_disagree(*self.p_a)


def orders_disagree(first: float | None, second: float | None) -> bool:
    """Return whether a judge chose another answer when the order was turned round.

    Args:
        first: P(A is better) with A shown first; None: unreadable.
        second: P(A is better) with B shown first, likewise.

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
    """The Trajectory that was judged."""
    reviewer: str
    """Who judged."""
    decision: Literal["approve", "flip", "tie", "edit", "draft", "reject", "skip", "flag", "undo"]
    """What the person decided."""
    answer: Message | None = None
    """The person's own answer, where the decision is `edit`."""
    verdicts: tuple[Verdict, ...] = ()
    """Labels that the person gave the draft, by principle or aim."""
    note: str | None = None
    """The person's words."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of this shape."""


class Feedback(Base, frozen=True, kw_only=True, tag_field="record", tag="feedback"):
    """The end user's signal on a released answer; appended, never edited."""

    id: str
    """UUIDv7."""
    at: datetime
    """When it came, UTC."""
    trajectory_id: str
    """The Trajectory that it is about."""
    score: float
    """-1 (bad) to 1 (good)."""
    user: str | None = None
    """Who gave it, by the application's id."""
    note: str | None = None
    """The user's words."""
    schema: int = msgspec.field(default_factory=_current_version)
    """Version of this shape."""


Record = Trajectory | Comparison | Review | Feedback
"""What a log holds."""


# --- JSON ---------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version n -> the function that turns a record's JSON of version n into version n + 1."""


def encode(record: Record) -> bytes:
    """Return the record as one line of ASCII JSON, without a line end; `decode` reads it.

    Raises:
        DataError: a number is NaN or infinite, metadata is not JSON, or a field is of a wrong type.
    """
    try:
        data = _encoder.encode(record)
        # It writes text as UTF-8, NaN and infinity as null, and whatever stands in a field.
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
        DataError: not JSON, not a record, or written by a newer release; the message says which.
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
    """Return the time in UTC."""
    return datetime.now(UTC)


# --- names of answers ---------------------------------------------------------------------------------

_REVISION = re.compile(r"revision:([0-9]+):([0-9]+)")


def revision_name(number: int, index: int) -> str:
    """Return the name of a revision: `revision:ROUND:INDEX`, counted from 0."""
    return f"revision:{number}:{index}"


def revision_at(name: str) -> tuple[int, int] | None:
    """Return which round and which revision of it a name is of; None for another answer's name.

    >>> revision_at("revision:0:1"), revision_at("draft")
    ((0, 1), None)
    """
    found = _REVISION.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


# --- what is said -------------------------------------------------------------------------------------


def text_of(message: Message | BaseMessage) -> str:
    """Return what a message says, which is judged: its text, and after it what other parts of it say."""
    shown = shown_of(message)
    if isinstance(message.content, str):
        return shown
    beside = filter(None, map(words_in, message.content))
    return "\n".join([shown, *beside] if shown else beside)


def shown_of(message: Message | BaseMessage) -> str:
    """Return the text of a message as its readers see it: its string, or what its parts say, joined."""
    content = message.content
    if isinstance(content, str):
        return content
    return "".join(said for part in content if (said := said_in(part)) is not None)
