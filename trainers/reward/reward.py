"""The stage that trains reward models on soft labels, over TRL's RewardTrainer: one model or an ensemble.

    weights    all weights (or adapters) are trained
    head       only the head, fitted to hidden states of the frozen model, which are computed once: for a CPU

The loss of a pair whose rewards differ by d is its cross-entropy against P(chosen is better)
(`trainers.stages.soft`), plus a penalty that pulls all rewards towards 0 (Eisenstein et al. 2023,
arXiv:2312.09244, section 4).

After training, rewards are shifted so that their mean over a reference set is 0: the held-out answers, or
else those trained on (512 pairs of them, drawn with the seed; with `head` all). The shift is stored as
`reward_shift` in the model's config.json, and `trainers.policy.load_reward` subtracts it from every reward.
Other loaders return rewards that are higher by this constant; differences, and so preferences, are the same.

The members of an ensemble start from the same weights, head included, and differ in seed and order of rows.
The Checkpoint is then their average (WARM, see `averaging`), and OUTPUT/members/0, 1, … are Checkpoints
themselves, to be used as an ensemble: the mean of their rewards, and their disagreement.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai_graph.errors import ConfigError, DataError
from trainers import atomic
from trainers.checkpoint import Checkpoint
from trainers.config import at_least
from trainers.policy import score_ids
from trainers.reward import frozen, reliability
from trainers.reward.averaging import averaged
from trainers.reward.reliability import Pair
from trainers.rows import Kind
from trainers.stages import MAY_CHANGE, Run, StageConfig, partial, plan, run
from trainers.stages.encoding import Encoder, Row, Shape, open_data
from trainers.stages.soft import READS, Labelled, label_of, soft_loss
from trainers.weights import quietly

__all__ = ["HELD_OUT", "KINDS", "MEMBERS", "Config", "members", "train"]

KINDS: tuple[Kind, ...] = ("preference",)
"""Kinds of datasets that the stage reads."""
MEMBERS = "members"
"""Folder of an ensemble's members, inside the folder of their average."""
PLOT = "reliability.svg"
REFERENCE = 512
"""Maximum number of pairs drawn for the reference set if none are held out."""
HELD_OUT = "heldout.jsonl"
"""File with the rewards of the held-out pairs, one line each."""
_SCORED = 16


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of reward modelling."""

    learning_rate: float = 1e-5
    """Highest learning rate, of AdamW (Lee et al. 2023, appendix)."""
    trains: Literal["weights", "head"] = "weights"
    """`head`: the model is frozen and its head fitted; depth and L2 penalty are chosen by cross-validation,
    and the settings of learning rate, passes and batches have no effect. With precision `auto` the model
    is read in bf16 also on a CPU that supports bf16 products."""
    layers: int | None = None
    """Keep only this many of the model's lowest layers; None: all. With `head`, the maximum depth tried."""
    members: int = 1
    """Number of reward models to train; if there are several, the Checkpoint is their average."""
    center_rewards_coefficient: float = 0.01
    """Weight of the mean squared sum of a pair's rewards in the loss (TRL's name); 0 disables it."""
    by: str = "source"
    """Column by which held-out figures are grouped; any column other than `source` must exist in the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "layers", "members")
        at_least(0, self, "center_rewards_coefficient")
        if self.trains == "head" and self.lora is not None:
            raise ConfigError("trains: head leaves the model as it is, and lora changes it; leave one out")
        if self.trains == "head" and self.members > 1:
            raise ConfigError(
                "members: a head on a frozen model has one optimum, which every member would find; "
                "train weights, or one member"
            )
        pull = self.center_rewards_coefficient
        if self.trains == "head" and pull != type(self).center_rewards_coefficient:
            raise ConfigError(
                f"center_rewards_coefficient {pull:g} has no effect with trains: head, whose L2 penalty "
                "keeps rewards small; leave it out"
            )

    def fewest(self, processes: int) -> tuple[int, str]:
        """Return the same as the base class; `head` is fitted to all rows at once, in one process."""
        return (1, "of a fit") if self.trains == "head" else super().fewest(processes)


def train(config: Config) -> Checkpoint:
    """Train on pairs of answers, and return the Checkpoint.

    Rows are `prompt`, `chosen` and `rejected`, with `p_chosen` in [0, 1] (1 if absent) and `weight` above 0
    (1 if absent); weights are scaled to a mean of 1. Held-out rows give the figures: accuracy, calibration
    error and loss, of all and by group, and a reliability plot.

    Raises:
        CaiError: as documented in `trainers.stages.run`.
    """
    if config.members == 1:
        return _one(config, config.seed)
    atomic.absent(config.output)
    work = config.output.with_name(config.output.name + ".members")
    made = []
    for number in range(config.members):
        folder = work / str(number)
        one = dataclasses.replace(config, members=1, seed=config.seed + number, output=folder)
        made.append(_resumed(one) or _one(one, config.seed))
    found = _average(config, made)
    shutil.rmtree(work)
    return found


def members(folder: Path) -> tuple[Path, ...]:
    """Return the folders of an ensemble's members; empty if the checkpoint is a single reward model."""
    found = (folder / MEMBERS).glob("*/config.json")
    return tuple(sorted((path.parent for path in found), key=lambda path: int(path.name)))


def _one(config: Config, head_seed: int) -> Checkpoint:
    return run(config, _shape(config), lambda begun: _trainer(begun, config, head_seed))


def _resumed(config: Config) -> Checkpoint | None:
    """Return this member if an interrupted run finished it; raise ConfigError if its plan differs."""
    if not config.output.exists():
        return None
    found = Checkpoint.open(config.output)
    if found.manifest is None:
        raise ConfigError(f"{config.output}: has no manifest; remove {config.output.parent}")
    source, data = open_data(config.data, KINDS), found.manifest.data
    made = {
        "stage": found.manifest.stage,
        "config": found.manifest.config,
        "models": list(found.manifest.parents),
        "data": data["digest"],
        "test data": data.get("test_digest", source.test_digest),  # earlier versions did not record it
    }
    wanted = json.loads(json.dumps(plan(config, "reward", source)))
    if otherwise := partial.changed(made, wanted, MAY_CHANGE):
        raise ConfigError(
            f"{config.output}: is a member of a run that was begun otherwise: {'; '.join(otherwise)}. Go on "
            f"with what it was begun with, or remove {config.output.parent} to start again"
        )
    return found


def _shape(config: Config) -> Shape:
    def encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
        label = label_of(row)
        pair = encoder.pair(row)
        return [
            {
                "chosen_ids": pair.prompt + pair.chosen,
                "rejected_ids": pair.prompt + pair.rejected,
                **label,
                "group": str(row.get(config.by, "")),
                "prompt": hashlib.sha256(json.dumps(pair.prompt).encode()).hexdigest(),
            }
        ]

    return Shape(stage="reward", kinds=KINDS, reads=READS, encode=encode)


# --- the trainer --------------------------------------------------------------------------------------


class Rewards(NamedTuple):
    """Rewards of the two answers of a pair."""

    chosen: float
    rejected: float


def _trainer(begun: Run, config: Config, head_seed: int, made: Sequence[Checkpoint] = ()) -> Any:
    from trl import RewardConfig

    if config.by != type(config).by and not any(begun.train["group"]):
        raise ConfigError(f"by: no row of {config.data} has a column {config.by!r}; name one that is there")
    model = _member(made[0]) if made else _base(begun, config, head_seed)
    model.config.reward_shift = 0.0  # reset that of the model that training starts from
    model.config.pad_token_id = begun.tokenizer.pad_token_id
    kind = _average_trainer() if made else _head_trainer() if config.trains == "head" else _soft_trainer()
    trainer = kind(
        model=model,
        args=RewardConfig(
            **begun.arguments(),
            max_length=None,
            center_rewards_coefficient=None,
            disable_dropout=False,  # keeps the dropout of adapters, which was configured
        ),
        train_dataset=begun.train,
        processing_class=begun.tokenizer,
        peft_config=None if made else begun.adapter("SEQ_CLS"),
    )
    trainer.begin(begun, config, made)
    return trainer


def _base(begun: Run, config: Config, head_seed: int) -> Any:
    """Return the model that training starts from, with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(), quietly():  # suppresses the warning that the head is new
        torch.manual_seed(head_seed)  # all members start with the same head
        model = begun.model(AutoModelForSequenceClassification, dropout=False, num_labels=1)
    return model if config.layers is None else frozen.build(model, config.layers)


@cache
def _soft_trainer() -> Any:
    """Return TRL's trainer with the soft loss instead of its own, and with figures computed at the end."""
    from trl import RewardTrainer

    class SoftRewardTrainer(RewardTrainer):  # type: ignore[misc]
        """Reward modelling with soft labels and weights, on rows that are token ids already."""

        data_collator: Any
        _signature_columns: Any

        def begin(self, begun: Run, config: Config, made: Sequence[Checkpoint]) -> None:
            """Set what is needed in addition to the arguments of TRL's trainer."""
            self.begun, self.stage, self.made = begun, config, made
            self.data_collator = Labelled(self.data_collator)
            self.mean_weight = statistics.fmean(begun.train["weight"])

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = sorted({*self._signature_columns, "p_chosen", "weight"})

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            p_chosen, weights = inputs.pop("p_chosen"), inputs.pop("weight") / self.mean_weight
            _, outputs = super().compute_loss(model, inputs, return_outputs=True)  # keeps TRL's figures
            chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
            loss = soft_loss(chosen - rejected, p_chosen, weights).mean()
            loss = loss + self.stage.center_rewards_coefficient * (chosen + rejected).square().mean()
            return (loss, outputs) if return_outputs else loss

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """Train, then centre the rewards and measure them."""
            found = super().train(*args, **kwargs)
            if self.state.global_step >= self.state.max_steps:  # otherwise it was interrupted
                self.measure()
            return found

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Do nothing: `measure` computes the figures."""
            return {}

        def measure(self) -> None:
            """Centre the rewards, and write the figures of held-out pairs."""
            test = self.begun.test
            rows = self.trained_on() if test is None else test
            raw = self.rewards(rows)
            shift = statistics.fmean(reward for pair in raw for reward in pair)
            if not math.isfinite(shift):
                raise DataError(f"the mean reward of {len(raw):,} pairs is {shift}; lower learning_rate")
            self.accelerator.unwrap_model(self.model).config.reward_shift = shift
            self.log({"reward_shift": shift})
            if test is None:
                return
            found = [Rewards(pair.chosen - shift, pair.rejected - shift) for pair in raw]
            pairs = _pairs(found, rows)
            self.log(_named("eval", pairs))
            if self.accelerator.is_main_process:
                reliability.plot(self.begun.beside / PLOT, pairs, self.stage.output.name)
                _write(self.begun.beside / HELD_OUT, found, rows)

        def trained_on(self) -> Any:
            """Return a sample of the pairs that were trained on."""
            train = self.begun.train
            drawn = random.Random(self.stage.seed).sample(range(len(train)), min(REFERENCE, len(train)))
            return train.select(sorted(drawn))

        def rewards(self, rows: Any) -> list[Rewards]:
            """Return the rewards of pairs. Every process computes all: the model may be sharded over them."""
            self.model.eval()
            texts = [*rows["chosen_ids"], *rows["rejected_ids"]]
            pad, device = self.begun.tokenizer.pad_token_id, self.accelerator.device
            found = score_ids(self.model_wrapped, texts, pad=pad, batch_size=_SCORED, device=device)
            return list(map(Rewards, found[: len(rows)], found[len(rows) :]))

    return SoftRewardTrainer


@cache
def _head_trainer() -> Any:
    """Return a trainer that fits the head and does not change the other weights."""
    import numpy
    import torch

    class HeadTrainer(_soft_trainer()):  # type: ignore[misc]
        """The head alone, on the states of the frozen model."""

        def train(self, *args: Any, **kwargs: Any) -> None:
            """Choose depth and penalty, fit, and measure."""
            started, begun, train, model = time.monotonic(), self.begun, self.begun.train, self.model
            if self.accelerator.num_processes > 1:
                raise ConfigError("trains: head is a fit of one process; start it without accelerate launch")
            self.depths = frozen.depths(len(model.base_model.layers))
            folds = frozen.folds_of([prompt.encode() for prompt in train["prompt"]])
            model.eval().to(torch.bfloat16 if _bf16(begun) else torch.float32)
            found = self.states(train)
            p_chosen = numpy.array(train["p_chosen"])
            weights = numpy.array(train["weight"]) / self.mean_weight
            tried = frozen.choose(found, self.depths, p_chosen, weights, folds)
            best, self.place = tried[0], self.depths.index(tried[0].depth)
            margins = found[:, 0, self.place] - found[:, 1, self.place].astype(float)
            self.fit = frozen.fit(margins, p_chosen, weights, best.penalty)
            begun.seconds = time.monotonic() - started
            self.measure()
            # The frozen weights were rounded before the states were computed; the head must not be rounded.
            frozen.build(model.float(), best.depth, self.fit.weight)
            lines = "".join(json.dumps(one._asdict()) + "\n" for one in tried)
            (begun.beside / "choices.jsonl").write_text(lines, encoding="utf-8")
            self.log({"loss": self.fit.loss, **{f"cv_{key}": value for key, value in best._asdict().items()}})

        def states(self, rows: Any) -> Any:
            """Return the states of pairs at every depth."""
            pairs = list(zip(rows["chosen_ids"], rows["rejected_ids"], strict=True))
            return frozen.states(self.model, pairs, self.depths, self.begun.work / "states")

        def trained_on(self) -> Any:
            """Return all pairs, since their states are cached already."""
            return self.begun.train

        def rewards(self, rows: Any) -> list[Rewards]:
            """Return the rewards of pairs, computed from their states."""
            told = self.states(rows)[:, :, self.place].astype(float) @ self.fit.weight
            return [Rewards(*pair) for pair in told.tolist()]

    return HeadTrainer


def _bf16(begun: Run) -> bool:
    """Return whether the frozen model is read in bf16: by default, if the hardware supports it."""
    import torch

    if begun.config.precision != "auto":
        return begun.config.precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- several ------------------------------------------------------------------------------------------


def _average(config: Config, made: Sequence[Checkpoint]) -> Checkpoint:
    return run(config, _shape(config), lambda begun: _trainer(begun, config, config.seed, made))


@cache
def _average_trainer() -> Any:
    """Return a trainer that averages the members."""

    class AverageTrainer(_soft_trainer()):  # type: ignore[misc]
        """The mean of the members' weights."""

        def train(self, *args: Any, **kwargs: Any) -> None:
            """Compute the average, measure it, and copy the members next to it."""
            self.model.load_state_dict(averaged([_member(one).state_dict() for one in self.made]))
            self.begun.seconds = math.fsum(one.manifest.seconds for one in self.made if one.manifest)
            self.measure()
            self.log(_ensemble(self.made))
            if self.accelerator.is_main_process:
                for number, one in enumerate(self.made):
                    folder = self.begun.beside / MEMBERS / str(number)
                    shutil.copytree(one.path, folder, dirs_exist_ok=True)

    return AverageTrainer


def _member(made: Checkpoint) -> Any:
    """Return a member in 32 bits, as it was written: adapters train on a base read in 16 or 4 bits."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        made.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def _ensemble(made: Sequence[Checkpoint]) -> dict[str, float]:
    """Return the held-out figures of the mean of the members' rewards, and the members' disagreement."""
    files = [one.path / HELD_OUT for one in made]
    if not all(file.exists() for file in files):
        return {}
    read = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    together = list(zip(*read, strict=True))
    pairs = [
        _pair(statistics.fmean(one["chosen"] - one["rejected"] for one in rows), rows[0]) for rows in together
    ]
    apart = [statistics.pstdev(one[side] for one in rows) for rows in together for side in Rewards._fields]
    alone = [
        reliability.measured([_pair(one["chosen"] - one["rejected"], one) for one in rows])[
            reliability.ALL
        ].accuracy
        for rows in read
    ]
    return _named("ensemble", pairs) | {
        "ensemble_disagreement": statistics.fmean(apart),
        "members_accuracy": statistics.fmean(alone),
    }


# --- figures ------------------------------------------------------------------------------------------


def _pair(margin: float, row: Mapping[str, Any]) -> Pair:
    return Pair(margin, row["p_chosen"], row["group"], row["prompt"])


def _pairs(found: Sequence[Rewards], rows: Any) -> list[Pair]:
    return [_pair(one.chosen - one.rejected, row) for one, row in zip(found, _labels(rows), strict=True)]


def _labels(rows: Any) -> Any:
    return rows.select_columns(["p_chosen", "group", "prompt"])


def _named(prefix: str, pairs: Sequence[Pair]) -> dict[str, float]:
    found = reliability.figures(reliability.measured(pairs))
    return {f"{prefix}_{name}": value for name, value in found.items()}


def _write(path: Path, found: Sequence[Rewards], rows: Any) -> None:
    lines = [{**one._asdict(), **row} for one, row in zip(found, _labels(rows), strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
