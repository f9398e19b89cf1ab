"""Estimates the work of a `cai distill` run before it starts: tokens and approximate time of each step."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from cai_graph import bulk, local
from cai_graph.critic.probe import Probe
from cai_graph.critic.trained import PREFIX
from cai_graph.log import open_log
from cai_graph.trajectory import Outcome
from trainers.distill.config import Config
from trainers.distill.launch import processes
from trainers.distill.pipeline import Needs, Pipeline
from trainers.tables import prompts_in
from trainers.weights import path_of

__all__ = ["Size", "estimate"]

_CHARS_PER_TOKEN = 4.0
_INSTRUCTIONS = 700
"""Approximate number of tokens of a critique's constitution and instructions."""
_QUESTION = 100
"""Approximate number of tokens of a probe's template."""


class Size(NamedTuple):
    """What is known about the amount of work before it starts. All figures are estimates."""

    config: Config
    prompts: int
    prompt_tokens: int
    """Mean number of tokens of a prompt."""

    @classmethod
    def of(cls, config: Config, copy: Path | None = None) -> Size:
        """Count the prompts and measure their lengths.

        Args:
            config: of the pipeline.
            copy: the log that the step `trajectories` made, if it is finished: it is counted instead, and the
                logs of the config need not exist.

        Raises:
            DataError, LogError: the prompts, or a log, cannot be read.
        """
        texts: list[int] = []
        if config.prompts is not None:
            with contextlib.closing(bulk.Rows(str(config.prompts))) as rows:
                read_rows = itertools.islice(rows.prompts(config.column), config.limit)
                texts = [
                    sum(len(str(message.content)) for message in row.messages)
                    for row in read_rows
                    if isinstance(row, bulk.Prompt)
                ]
        count = len(texts) if copy is None else 0
        for url in config.logs if copy is None else [f"sqlite:///{copy}"]:
            with open_log(url, read_only=True) as log:
                stats = log.stats()
            count += stats.trajectories - stats.outcomes.get(Outcome.FAILED, 0)
        mean = sum(texts) / len(texts) / _CHARS_PER_TOKEN if texts else 60
        return cls(config, count, round(mean) + 10)

    @property
    def new(self) -> int:
        """Number of prompts still to be answered."""
        if self.config.prompts is None:
            return 0
        return self.prompts if not self.config.logs else min(self.prompts, self.config.limit or self.prompts)

    def drafts(self) -> tuple[Needs, ...]:
        """Return the needs of drafting, judging and revising."""
        if self.config.prompts is None:
            return ()
        drafts = self.config.drafts
        writer, critic = drafts.model or self.config.model, drafts.critic
        judged = self.new * (self.prompt_tokens + drafts.max_tokens + _asked(critic or writer))
        written = self.new * drafts.max_tokens * 2  # half of the drafts are revised, at twice the length
        return (
            _needs(writer, read=self.new * self.prompt_tokens * 2, written=written),
            _needs(critic or writer, read=2 * judged),
        )

    def training(self, module: str, config: Any) -> tuple[Needs, ...]:
        """Return the needs of a training stage."""
        answer = {"sft": self.config.drafts.max_tokens}.get(module, self.config.feedback.max_tokens)
        row = min(self.prompt_tokens + answer, config.max_tokens)
        passed = self.prompts * (1 - self.config.rows.test_share) * config.epochs
        base = self.config.model
        if module == "ppo":
            updates = config.max_steps or max(1, math.floor(passed / config.rollout_size))
            drawn = config.rollout_size * updates
            longest = min(config.max_answer, row)
            trained = drawn * row * config.ppo_epochs
            return (_needs(base, read=3 * drawn * row, written=drawn * longest, trained=trained),)
        update = config.batch_size * config.accumulate * (processes(self.config.launch) or 1)
        answers = config.answers if module == "online" else 1
        rows = update * config.max_steps if config.max_steps else round(passed * answers)
        if module == "online":
            return (_needs(base, read=2 * rows * row, written=rows * config.max_answer, trained=rows * row),)
        both = 2 if module in ("dpo", "reward") else 1
        read_only = both * rows * row if module == "dpo" else 0
        return (_needs(base, read=read_only, trained=both * rows * row),)

    def feedback(self) -> tuple[Needs, ...]:
        """Return the needs of sampling and comparing answers."""
        feedback = self.config.feedback
        count = min(self.prompts, feedback.limit or self.prompts)
        drawn = count * feedback.samples if "samples" in feedback.pairs else 0
        judge = feedback.judge or feedback.critic or "local"
        orders = 2 * feedback.principles if feedback.judge else 1
        asked = max(drawn, count) * orders * (self.prompt_tokens + feedback.max_tokens + _asked(judge))
        sampler = feedback.sampler or self.config.model
        return (
            _needs(sampler, read=drawn * self.prompt_tokens, written=drawn * feedback.max_tokens),
            _needs(judge, read=asked),
        )

    def evaluation(self) -> tuple[Needs, ...]:
        """Return the needs of answering the suites and grading the answers."""
        wanted = self.config.evaluation
        count = 0
        for path in wanted.suites.values():
            count += 3 * sum(
                1 for _ in itertools.islice(prompts_in(path), wanted.limit)
            )  # three models answer
        made = _needs(self.config.model, read=count * self.prompt_tokens, written=count * wanted.max_tokens)
        if wanted.critic is None:
            return (made,)
        return made, _needs(
            wanted.critic, read=count * (self.prompt_tokens + wanted.max_tokens + _asked(wanted.critic))
        )


def _asked(critic: str) -> int:
    """Return the number of tokens that a critic reads besides a conversation."""
    reads = critic.startswith(PREFIX) or Probe.for_model(critic) is not None
    return _QUESTION if reads else _INSTRUCTIONS


def _needs(who: str, *, read: int = 0, written: int = 0, trained: int = 0) -> Needs:
    return Needs(parameters=_parameters(who), read=read, written=written, trained=trained)


def _parameters(spec: str) -> float | None:
    """Return the approximate number of weights computed on this machine; None if a server computes."""
    if (model := local.model_of(spec)) is not None:
        return model.size * 8 / 5  # about 5 bits a weight
    path = path_of(spec.removeprefix(PREFIX))
    if path is None or not path.exists():
        return None
    if path.is_file():
        return path.stat().st_size * 8 / 5
    if spec.startswith(PREFIX):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a probe's card; a classifier has weights
            return _parameters(json.loads((path / "card.json").read_text())["model"]["spec"])
    return sum(one.stat().st_size for one in path.rglob("*.safetensors")) / 3  # between fp32 and bf16


def estimate(steps: Pipeline) -> dict[str, float | None]:
    """Return the approximate seconds of each step that is not done; None if they depend on a server.

    Computed from floating-point operations (2 per weight and token read, 6 per token trained) and the
    measured speed of this machine's processors; a generated token counts three times, since generation is
    bound by memory. Expect an error of a factor of two or three, and far too high values if a GPU computes.
    """
    speed = _speed()
    found: dict[str, float | None] = {}
    for step in steps.steps:
        if steps.state(step) == "done":
            found[step.name] = 0.0
            continue
        seconds: float | None = 5.0
        for one in step.needs:
            if one.parameters is None:
                seconds = None
                break
            work = 2 * one.read + 6 * one.written + 6 * one.trained
            seconds = (seconds or 0.0) + one.parameters * work / speed
        found[step.name] = seconds
    return found


def _speed() -> float:
    """Return the floating-point operations per second that a model reaches on all idle cores of this machine,
    measured by the processor time of a matrix product."""
    import numpy as np

    matrix: Any = np.ones((768, 768), dtype=np.float32)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        matrix = matrix @ matrix / 768
        best = min(best, time.process_time() - started)
    return 2 * 768**3 / best * local.usable_cores()
