"""The config that every training stage extends, and the run of a stage with one of TRL's trainers.

    OUTPUT.partial/     an unfinished run: rows as token ids, saved states; removed at the end
    OUTPUT/             the Checkpoint; created at the end, complete or not at all

A run that was interrupted, killed or stopped by an error resumes from its last saved state when it is started
again with the same config (`trainers.stages.guarded`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cai_graph.errors import ConfigError, ModelError
from trainers import atomic, checkpoint, weights
from trainers.checkpoint import Checkpoint, Manifest
from trainers.config import above, at_least, plain, require
from trainers.policy import four_bits
from trainers.stages import guarded, partial
from trainers.stages.encoding import Counts, Encoder, Hazard, NothingLeft, Shape, Source, encode, open_data
from trainers.stages.lora import Lora, without_dropout

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "MAY_CHANGE",
    "Hazard",
    "Run",
    "StageConfig",
    "Tracker",
    "check_machine",
    "computes_in_bf16",
    "manifest",
    "plan",
    "run",
]

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
_TRACKED_BY = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages, any one of which a tracker needs; a tracker that is not listed needs the package of its name."""

SEEDS = 2**31
"""Seeds are below this. numpy's limit is twice as high: ensemble members and processes add to the seed."""

MAY_CHANGE = {"output", "log_steps", "save_steps", "report_to"}
"""Settings that may differ when an interrupted run is resumed."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of every stage; each stage adds its own and sets its paper's learning rate."""

    model: str
    """The model that training starts from: a folder with safetensors and tokenizer (a Checkpoint), `local`,
    `local:NAME`, `local:FILE.gguf`, or a name on the hub, which is downloaded."""
    data: Path
    """A folder of `cai dataset build`, or a file of TRL's format in JSONL, JSON or Parquet."""
    output: Path
    """Folder of the Checkpoint to create; an unfinished run is kept in `OUTPUT.partial`."""
    seed: int = 0
    """Seed of everything random: order of rows, adapters, dropout; from 0 to 2,147,483,647."""
    learning_rate: float = 1e-5
    """Highest learning rate, of AdamW."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Number of updates, instead of `epochs`."""
    batch_size: int = 8
    """Rows per forward pass on one device."""
    accumulate: int = 1
    """Forward passes per update; an update has batch_size x accumulate x processes rows."""
    max_tokens: int = 1024
    """Maximum tokens of a row: prompt and answer together."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate changes after the warm-up."""
    warmup: float = 0.0
    """Share of the updates over which the learning rate rises, in [0, 1)."""
    lora: Lora | None = None
    """Train adapters; None: all weights. The Checkpoint contains the merged weights and the adapter."""
    quantized: bool = False
    """Load the base in 4 bits (QLoRA, Dettmers et al. 2023); needs `lora`, a GPU and bitsandbytes."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation; `auto`: bf16 if the GPU supports it, else fp32."""
    recompute: bool = False
    """Recompute activations in the backward pass (gradient checkpointing): less memory, more time."""
    allow: tuple[Hazard, ...] = ()
    """Hazards of the data that the user accepts; any other hazard is an error."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that receive the metrics; TensorBoard's files go into the Checkpoint's `runs`."""
    log_steps: int = 10
    """Updates between two log lines of metrics."""
    save_steps: int = 200
    """Updates between two saved states that an interrupted run can resume from."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "accumulate", "max_tokens", "log_steps", "save_steps", "max_steps")
        above(0, self, "learning_rate", "epochs")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed is a number from 0 to {SEEDS - 1:,}, found {self.seed!r}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share from 0 to below 1, found {self.warmup!r}")
        if self.quantized and self.lora is None:
            raise ConfigError("quantized weights cannot be trained themselves; set lora, too")
        for name, menu in (("allow", get_args(Hazard)), ("report_to", get_args(Tracker))):
            for found in getattr(self, name):
                if found not in menu:
                    raise ConfigError(f"{name} takes {', '.join(menu)}; found {found!r}")
        if {"drop-long", "cut-long"} <= set(self.allow):
            raise ConfigError("allow says drop-long and cut-long; keep one")

    @property
    def learns_from(self) -> tuple[Path, ...]:
        """Folders of the models that it uses besides the one that training starts from."""
        return ()

    @property
    def contents(self) -> dict[str, Any]:
        """Identities of the contents of settings that are neither models nor data, by setting; JSON."""
        return {}

    def fewest(self, processes: int) -> tuple[int, str]:
        """Return the minimum number of rows for this many processes, and what needs that many, in words."""
        return self.batch_size * processes, (
            f"of one forward pass (batch_size {self.batch_size} x {processes} processes); lower batch_size"
        )


@dataclass
class Run:
    """A running stage: everything that its trainer is built from."""

    config: StageConfig
    """The stage's config."""
    stage: str
    """Its name."""
    base: Checkpoint
    """The model that training starts from."""
    work: Path
    """The folder of the run."""
    tokenizer: Any
    """The model's tokenizer; it has a padding token."""
    train: Dataset
    """Rows to train on, encoded."""
    test: Dataset | None
    """Rows to evaluate on at the end, encoded; None where there are none."""
    counts: dict[str, Any]
    """Counts of the rows that were read, used and dropped, as `Counts.to_json` returns them."""
    seconds: float | None = None
    """Seconds of training, where the stage measures them itself; None: as the saved states record them."""
    weights_of_step: int | None = None
    """The update whose weights were restored; None: the weights are those of the last update."""
    beside: Path = field(init=False)
    """A folder whose files are copied into the Checkpoint: metrics, plots."""

    def __post_init__(self) -> None:
        self.beside = self.work / "beside"
        self.beside.mkdir(exist_ok=True)

    def model(self, architecture: Any = None, *, dropout: bool = True, **settings: Any) -> Any:
        """Load the base model from its folder, in 4 bits if the config asks for it.

        A trainer loads its reference model with this, too: the reference must be the model that training
        starts from, and not an earlier model that the weights in memory were trained from.

        Args:
            architecture: an Auto class of transformers; None for causal language models.
            dropout: whether to keep the model's own dropout. Adapters' dropout is not affected.
            settings: further arguments of `from_pretrained`.

        Raises:
            ConfigError: adapters cannot be trained on it.
        """
        import torch
        import transformers

        bf16 = computes_in_bf16(self.config)
        # Trained weights are kept in 32 bits, under autocast; beside an adapter, the base is only read.
        settings.setdefault("dtype", torch.bfloat16 if bf16 and self.config.lora else torch.float32)
        if self.config.quantized:
            settings["quantization_config"] = four_bits("bfloat16" if bf16 else "float32")
        auto = architecture or transformers.AutoModelForCausalLM
        found: Any = auto.from_pretrained(
            self.base.path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **settings,
        )
        if self.config.lora is not None:
            self.config.lora.check(found)
        return found if dropout else without_dropout(found)

    def adapter(self, task: str = "CAUSAL_LM") -> Any:
        """Return peft's config of the adapter to train; None where all weights are trained."""
        return self.config.lora and self.config.lora.adapter(task)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that every TRL config takes, from the stage's config."""
        import torch

        config, gpu = self.config, torch.cuda.is_available()
        return {
            "output_dir": str(self.work),
            "seed": config.seed,
            "data_seed": config.seed,
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": config.schedule,
            "warmup_steps": config.warmup,
            "num_train_epochs": config.epochs,
            "max_steps": config.max_steps or -1,
            "per_device_train_batch_size": config.batch_size,
            "per_device_eval_batch_size": config.batch_size,
            "gradient_accumulation_steps": config.accumulate,
            "activation_checkpointing": config.recompute,
            "bf16": computes_in_bf16(config),
            "use_cpu": not gpu,
            "dataloader_pin_memory": gpu,
            "report_to": list(config.report_to) or "none",
            "logging_steps": config.log_steps,
            "logging_nan_inf_filter": False,
            "save_strategy": "steps",
            "save_steps": config.save_steps,
            "save_total_limit": 2,
        }


def run(config: StageConfig, shape: Shape, build: Callable[[Run], Any]) -> Checkpoint:
    """Run one stage with a TRL trainer, from its config to its Checkpoint.

    Args:
        config: the stage's config.
        shape: how the stage encodes rows.
        build: builds the trainer from a Run; called once.

    Raises:
        ConfigError: the config cannot work: the output exists already, the model has no chat template, this
            machine does not support the precision, an interrupted run had another config.
        DataError: rows cannot be trained on as they are; names them, and the hazards to allow.
        MissingExtra: a package is not installed.
        ModelError: the model cannot be read, the loss is not finite, or the disk is full. The run is kept,
            with its last good saved state.
    """
    check_machine(config, shape.stage)
    atomic.absent(config.output)
    source = open_data(config.data, shape.kinds)  # before the model, which may be downloaded and converted
    base = Checkpoint.open(weights.resolve(config.model))
    with _quiet(), _folder(config, shape.stage, source) as work:
        from transformers import set_seed

        set_seed(config.seed)
        begun = _begin(config, shape, base, source, work)
        trainer = guarded.guard(build(begun), begun)
        guarded.train(trainer, begun)
        return _finish(trainer, begun, source)


def plan(config: StageConfig, stage: str, source: Source) -> dict[str, Any]:
    """Return the inputs that identify a run, for `partial.same_plan`."""
    return {
        "stage": stage,
        "config": plain(config),
        "models": parents(config),
        "files beside the models' weights": [model.shape for model in _models(config)],
        "data": source.digest,
        "test data": source.test_digest,
        **{f"content of {setting}": named for setting, named in config.contents.items()},
    }


def parents(config: StageConfig) -> tuple[str, ...]:
    """Return the digests of the model that a run starts from and of the models that it learns from."""
    return tuple(dict.fromkeys(model.digest for model in _models(config)))


def _models(config: StageConfig) -> list[Checkpoint]:
    folders = (weights.resolve(config.model), *config.learns_from)
    return [Checkpoint.open(folder) for folder in folders]


def manifest(
    config: StageConfig,
    stage: str,
    source: Source,
    counts: Mapping[str, Any],
    *,
    seconds: float,
    metrics: Mapping[str, float],
) -> Manifest:
    """Return the Manifest of a Checkpoint: how it was made.

    Args:
        config: the stage's config.
        stage: the stage's name.
        source: the training data.
        counts: counts of the rows, as `Counts.to_json` returns them; a stage may add entries. `constitutions`
            includes those of a reward.
        seconds: duration of training.
        metrics: the last value of each metric.
    """
    named = counts["constitutions"]
    return Manifest(
        stage=stage,
        base=config.model,
        parents=parents(config),
        config=plain(config),
        data={
            "path": str(source.path),
            "digest": source.digest,
            "test_digest": source.test_digest,
            "log_digest": source.log_digest,
            **{key: value for key, value in counts.items() if key != "constitutions"},
        },
        constitution_digests=tuple(sorted({*source.constitutions, *named})),
        seed=config.seed,
        versions=checkpoint.versions(),
        hardware=checkpoint.hardware(),
        seconds=seconds,
        metrics=metrics,
    )


# --- before training ----------------------------------------------------------------------------------


def check_machine(config: StageConfig, stage: str) -> None:
    """Check that this machine has what a config needs.

    Raises:
        ConfigError: the GPU or a package that a setting needs is missing.
        MissingExtra: a package that every stage needs is not installed.
    """
    require(f"`cai train {stage}`", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
    for tracker in config.report_to:
        if not any(map(find_spec, _TRACKED_BY.get(tracker, (tracker,)))):
            raise ConfigError(f"report_to: {tracker} is not installed; pip install {tracker}")
    import torch

    if config.precision == "bf16" and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        raise ConfigError(
            "precision bf16: this machine has no GPU that computes in it; leave precision out, for then it "
            "is fp32 here and bf16 where the GPU has it"
        )
    if config.quantized:
        if not torch.cuda.is_available():
            raise ConfigError("quantized: 4 bits need a GPU, and there is none here; leave quantized out")
        four_bits("float32")  # raises where bitsandbytes is not installed


def computes_in_bf16(config: StageConfig) -> bool:
    """Return whether training with a config computes in bf16 on this machine."""
    import torch

    return config.precision != "fp32" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress deprecation warnings about TRL's future names, and the telemetry of TRL and the hub client."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


@contextlib.contextmanager
def _folder(config: StageConfig, stage: str, source: Source) -> Iterator[Path]:
    """Yield the locked folder of the run: a new one, or that of a run with the same config."""
    state = _processes()
    with partial.held(config.output, is_main=state.is_main_process) as work:
        if state.is_main_process:
            partial.same_plan(work, plan(config, stage, source), MAY_CHANGE, points="checkpoint-*")
        state.wait_for_everyone()
        yield work


def _processes() -> Any:
    """Return accelerate's view of the processes that train together."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _begin(config: StageConfig, shape: Shape, base: Checkpoint, source: Source, work: Path) -> Run:
    tokenizer = _tokenizer(base.path)
    rows, state = work / "rows", _processes()
    if state.is_main_process and not (rows / "counts.json").exists():
        _encode(
            config,
            shape,
            source,
            Encoder(tokenizer, config.max_tokens, config.allow, _ends(base, tokenizer)),
            rows,
        )
    state.wait_for_everyone()
    counts = json.loads((rows / "counts.json").read_text(encoding="utf-8"))
    fewest, of = config.fewest(state.num_processes)
    if counts["rows"] < fewest:
        raise ConfigError(f"{source.train}: {counts['rows']:,} rows are fewer than the {fewest:,} {of}")
    train, test = _encoded(rows / "train.arrow"), _encoded(rows / "test.arrow")
    assert train is not None
    return Run(config, shape.stage, base, work, tokenizer, train, test, counts)


def _encode(config: StageConfig, shape: Shape, source: Source, encoder: Encoder, rows: Path) -> None:
    shutil.rmtree(rows, ignore_errors=True)
    rows.mkdir()
    counts: Counts = encode(source.train, shape, encoder, config.allow, rows / "train.arrow")
    found = counts.to_json()
    if source.test is not None:
        # Leaving out test rows changes no weights: the metrics are those of the remaining rows.
        spare: tuple[Hazard, ...] = (*config.allow, "drop-unfit", "ignored-columns")
        spare += () if "cut-long" in config.allow else ("drop-long",)
        with contextlib.suppress(NothingLeft):
            found["test_rows"] = encode(source.test, shape, encoder, spare, rows / "test.arrow").rows
        if "test_rows" not in found:
            (rows / "test.arrow").unlink(missing_ok=True)
    atomic.write(rows / "counts.json", json.dumps(found))


def _encoded(path: Path) -> Dataset | None:
    if not path.exists():
        return None
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{folder}: its tokenizer names no end token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _ends(base: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Return the tokens at which the model's generation stops."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = base.path / name
        said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        found |= set(said) if isinstance(said, list) else {said}
    return frozenset(found - {None})


# --- after training -----------------------------------------------------------------------------------


def _finish(trainer: Any, run: Run, source: Source) -> Checkpoint:
    if run.test is not None:
        trainer.evaluate()
    seconds = run.seconds or guarded.seconds(run.work)
    metrics = _metrics(trainer.state.log_history, run.weights_of_step)
    written = run.work / "whole"
    try:
        _write(trainer, run, written)
    except partial.unwritable() as error:
        raise ModelError(
            f"{run.config.output}: cannot be written: {error}; free space and start it again"
        ) from error
    if trainer.accelerator.is_main_process:
        made_by = manifest(run.config, run.stage, source, run.counts, seconds=seconds, metrics=metrics)
        checkpoint.seal(run.config.output, written, made_by)
        shutil.rmtree(run.work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return Checkpoint.open(run.config.output)


def _write(trainer: Any, run: Run, folder: Path) -> None:
    """Write the weights, which takes all processes, and the main process's other files."""
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    trainer.save_model(str(folder))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the manifest records the same
    run.tokenizer.save_pretrained(folder)
    with (run.beside / "figures.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in trainer.state.log_history)
    shutil.copytree(run.beside, folder, dirs_exist_ok=True)
    if (run.work / "runs").exists():  # TensorBoard's
        shutil.copytree(run.work / "runs", folder / "runs", dirs_exist_ok=True)
    if hasattr(model := accelerator.unwrap_model(trainer.model), "peft_config"):
        checkpoint.merge(folder, model)


def _metrics(history: list[dict[str, Any]], until: int | None) -> dict[str, float]:
    """Return the last value of each metric, or the last one up to the update `until`."""
    last: dict[str, float] = {}
    for line in history:
        if until is None or line["step"] <= until:
            last |= {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
    return {key: value for key, value in last.items() if key not in ("step", "total_flos")}
