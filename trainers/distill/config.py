"""What a pipeline is told: `cai distill config.yaml`, a section a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cai_graph.errors import ConfigError
from trainers.evaluation.suites import Suite
from trainers.feedback import PairKind

__all__ = ["Config", "Drafts", "Evaluation", "Feedback", "Method", "Rows", "Section"]

Method = Literal["ppo", "rloo", "grpo", "dpo"]
Section = Mapping[str, Any]
"""Settings of a stage: a key its Config knows, and a value."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """How prompts become trajectories."""

    model: str | None = None
    """Who drafts: a spec; null: the model that is trained."""
    critic: str | None = None
    """Who judges; null: who drafts. `local` and `trained:FOLDER` write no word."""
    reviser: str | None = None
    """Who rewrites; null: who drafts."""
    strategy: Literal["batched", "parallel", "sampled"] = "batched"
    """How principles are asked; `sampled` is the paper's: one at random a round, always revised."""
    max_rounds: int | None = None
    """Rounds of critique and revision; null: the strategy's."""
    max_tokens: int = 256
    """Longest draft, in tokens; a revision may have twice as many."""
    temperature: float = 1.0
    """Of drafts and revisions."""
    concurrency: int = 4
    """Prompts under way at once."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How trajectories become rows; see `cai dataset build`."""

    test_share: float = 0.1
    """Share of the prompts that are held out of training."""
    near_duplicates: float | None = 0.8
    """Similarity from which prompts stay on one side; 0: none are looked for."""
    kept_per_revised: float | None = None
    """Kept drafts for each revision in the supervised phase, at most; null: all."""
    per_user: int | None = None
    """Most rows of one user."""
    personal_data: Literal["drop", "keep"] = "drop"
    """Rows that seem to hold personal data or a secret."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How the policy's answers are drawn and compared."""

    judge: str | None = None
    """Who compares two answers."""
    critic: str | None = None
    """Who judges each answer alone instead, such as `local`."""
    sampler: str | None = None
    """Who answers: null: the checkpoint of sft, here; or the URL of the server that you run it on."""
    pairs: tuple[PairKind, ...] = ("samples",)
    """What is compared: `samples` of the policy, `revision` against draft, `rejected` candidates."""
    samples: int = 2
    """Answers drawn to each prompt."""
    principles: int = 1
    """Principles that a judge is asked about for each pair."""
    max_tokens: int = 256
    """Longest drawn answer."""
    temperature: float = 1.0
    """Of the draw."""
    limit: int | None = None
    """Trajectories that are labelled, from the first; null: all."""
    concurrency: int = 16
    """Trajectories under way at once."""

    def __post_init__(self) -> None:
        if (self.judge is None) == (self.critic is None):
            raise ConfigError("feedback: name a judge or a critic, one of the two")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """On what, and by whom, the checkpoints are measured. None of the prompts is trained on."""

    harmlessness: Path | None = None
    """Red-team prompts."""
    helpfulness: Path | None = None
    """Benign prompts."""
    over_refusal: Path | None = None
    """Prompts that look unsafe; a column `label` says safe or unsafe, as in XSTest."""
    limit: int | None = None
    """Most prompts of a suite."""
    max_tokens: int = 256
    """Longest answer."""
    batch_size: int = 16
    """Answers written at once."""
    critic: str | None = None
    """Grades harmlessness and helpfulness by its verdicts."""
    reward: tuple[str, ...] = ()
    """Grade them by a number; a reward model should not be the one that was trained against."""
    refusals: str | None = None
    """Who says what a refusal is: pattern, probe, or a model's spec."""

    @property
    def suites(self) -> dict[Suite, Path]:
        """Return the file of each suite that has one."""
        files: dict[Suite, Path | None] = {
            "harmlessness": self.harmlessness,
            "helpfulness": self.helpfulness,
            "over-refusal": self.over_refusal,
        }
        return {name: path for name, path in files.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `cai distill` is told."""

    model: str
    """The model to train: local:NAME, local:FILE.gguf, or a folder with safetensors."""
    output: Path
    """Folder for everything; the finished model is served as local:OUTPUT."""
    prompts: Path | None = None
    """Prompts to answer: JSONL, CSV or text."""
    column: str | None = None
    """Column or key of the prompt; null: `prompt` or `messages`."""
    limit: int | None = None
    """Only so many prompts, from the first."""
    logs: tuple[str, ...] = ()
    """Logs by URL, such as that of production. They are copied once."""
    logs_as_of: str = ""
    """A word of yours for the copy, such as a date: another one copies the logs anew."""
    constitution: str = "balanced"
    """A built-in name, or a file."""
    seed: int = 0
    """Of everything random, where a section does not set its own."""
    launch: tuple[str, ...] = ()
    """Command that starts a training stage in several processes, such as `accelerate launch --config_file
    fsdp2.yaml`, word by word; empty: it runs in this one."""
    drafts: Drafts = Drafts()
    """Prompts to trajectories."""
    rows: Rows = Rows()
    """Trajectories to rows."""
    sft: Section = field(default_factory=dict)
    """Keys of `cai train sft`, but for model, data and output."""
    feedback: Feedback = Feedback(critic="local")
    """Whose answers are better."""
    reward: Section = field(default_factory=dict)
    """Keys of `cai train reward`; with `data` it learns from other labels than the feedback's."""
    rl: Section = field(default_factory=lambda: {"method": "ppo"})
    """`method` (ppo, rloo, grpo or dpo), and keys of that stage; with `reward` no reward model is trained."""
    evaluation: Evaluation = Evaluation()
    """What it came to."""

    def __post_init__(self) -> None:
        if self.prompts is None and not self.logs:
            raise ConfigError("name prompts (a file) or logs (URLs); there is nothing to learn from")
        if self.method not in get_args(Method):
            raise ConfigError(f"rl.method is one of {', '.join(get_args(Method))}; found {self.method!r}")

    @property
    def method(self) -> str:
        """The last stage of training."""
        return str(self.rl.get("method", "ppo"))
