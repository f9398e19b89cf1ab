"""Configuration of `cai distill`, as read from its YAML file: one section per step."""

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
"""Settings of a stage: keys of its Config, with values."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """How prompts become trajectories."""

    model: str | None = None
    """Spec of the model that drafts; null: the model that is trained."""
    critic: str | None = None
    """Spec of the critic; null: the drafting model. `local` and `trained:FOLDER` generate no text."""
    reviser: str | None = None
    """Spec of the model that revises; null: the drafting model."""
    strategy: Literal["batched", "parallel", "sampled"] = "batched"
    """How principles are judged; `sampled` is the paper's: a random one per round, always revised."""
    max_rounds: int | None = None
    """Rounds of critique and revision; null: the strategy's default."""
    max_tokens: int = 256
    """Maximum tokens of a draft; a revision may have twice as many."""
    temperature: float = 1.0
    """Sampling temperature of drafts and revisions."""
    concurrency: int = 4
    """Prompts processed at once."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How trajectories become rows; see `cai dataset build`."""

    test_share: float = 0.1
    """Share of the prompts held out of training."""
    near_duplicates: float | None = 0.8
    """Similarity from which prompts are kept in the same split; 0: no search for near-duplicates."""
    kept_per_revised: float | None = None
    """Maximum number of kept drafts per revision in the supervised phase; null: all."""
    per_user: int | None = None
    """Maximum number of rows per user; null: no limit."""
    personal_data: Literal["drop", "keep"] = "drop"
    """What to do with rows that seem to contain personal data or a secret."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How the policy's answers are sampled and compared."""

    judge: str | None = None
    """Spec of the judge that compares two answers."""
    critic: str | None = None
    """Spec of a critic that judges each answer alone instead, such as `local`."""
    sampler: str | None = None
    """Model that samples the answers; null: the checkpoint of sft, in this process; or the URL of a server
    that you run it on."""
    pairs: tuple[PairKind, ...] = ("samples",)
    """Pairs to compare: `samples` of the policy, `revision` against draft, `rejected` candidates."""
    samples: int = 2
    """Answers sampled per prompt."""
    principles: int = 1
    """Principles that the judge is asked about for each pair."""
    max_tokens: int = 256
    """Maximum tokens of a sampled answer."""
    temperature: float = 1.0
    """Sampling temperature."""
    limit: int | None = None
    """Number of trajectories to label, from the first; null: all."""
    concurrency: int = 16
    """Trajectories processed at once."""

    def __post_init__(self) -> None:
        if (self.judge is None) == (self.critic is None):
            raise ConfigError("feedback: name a judge or a critic, one of the two")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Test prompts and graders of the checkpoints. None of the prompts is trained on."""

    harmlessness: Path | None = None
    """Red-team prompts."""
    helpfulness: Path | None = None
    """Benign prompts."""
    over_refusal: Path | None = None
    """Prompts that look unsafe; a column `label` is safe or unsafe, as in XSTest."""
    limit: int | None = None
    """Maximum number of prompts per suite."""
    max_tokens: int = 256
    """Maximum tokens of an answer."""
    batch_size: int = 16
    """Answers generated at once."""
    critic: str | None = None
    """Grades harmlessness and helpfulness by its verdicts."""
    reward: tuple[str, ...] = ()
    """Reward specs that grade both numerically; avoid the reward model that was trained against."""
    refusals: str | None = None
    """Classifier of refusals: pattern, probe, or a model's spec."""

    @property
    def suites(self) -> dict[Suite, Path]:
        """The file of each suite that has one."""
        files: dict[Suite, Path | None] = {
            "harmlessness": self.harmlessness,
            "helpfulness": self.helpfulness,
            "over-refusal": self.over_refusal,
        }
        return {name: path for name, path in files.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of `cai distill`."""

    model: str
    """The model to train: local:NAME, local:FILE.gguf, or a folder with safetensors."""
    output: Path
    """Folder for all results; the finished model is served as local:OUTPUT."""
    prompts: Path | None = None
    """Prompts to answer: JSONL, CSV or text."""
    column: str | None = None
    """Column or key of the prompt; null: `prompt` or `messages`."""
    limit: int | None = None
    """Use only this many prompts, from the first."""
    logs: tuple[str, ...] = ()
    """URLs of logs to learn from, such as a production log. They are copied once."""
    logs_as_of: str = ""
    """A label for the copy of the logs, such as a date: changing it copies them again."""
    constitution: str = "balanced"
    """A built-in name, or a file."""
    seed: int = 0
    """Seed of all random draws, unless a section sets its own."""
    launch: tuple[str, ...] = ()
    """Command that starts a training stage in several processes, such as `accelerate launch --config_file
    fsdp2.yaml`, as a list of words; empty: train in this process."""
    drafts: Drafts = Drafts()
    """Prompts to trajectories."""
    rows: Rows = Rows()
    """Trajectories to rows."""
    sft: Section = field(default_factory=dict)
    """Keys of `cai train sft`, except for model, data and output."""
    feedback: Feedback = Feedback(critic="local")
    """How answers are compared for the preferences."""
    reward: Section = field(default_factory=dict)
    """Keys of `cai train reward`; with `data` it is trained on other labels than the feedback's."""
    rl: Section = field(default_factory=lambda: {"method": "ppo"})
    """`method` (ppo, rloo, grpo, dpo), and keys of that stage; with `reward`, no reward model is trained."""
    evaluation: Evaluation = Evaluation()
    """How the checkpoints are evaluated."""

    def __post_init__(self) -> None:
        if self.prompts is None and not self.logs:
            raise ConfigError("name prompts (a file) or logs (URLs); there is nothing to learn from")
        if self.method not in get_args(Method):
            raise ConfigError(f"rl.method is one of {', '.join(get_args(Method))}; found {self.method!r}")

    @property
    def method(self) -> str:
        """The last stage of training."""
        return str(self.rl.get("method", "ppo"))
