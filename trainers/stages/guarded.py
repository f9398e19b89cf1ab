"""Guards a TRL trainer: checks the loss, marks complete saved states, and ends cleanly on Ctrl-C.

OUTPUT.partial/checkpoint-N/    a saved state ("point") after update N; it is valid only if it contains
                                `whole.json`, which is written last and records the seconds of training so far
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph.errors import ConfigError, ModelError
from trainers import atomic
from trainers.stages import partial

if TYPE_CHECKING:
    from trainers.stages.stages import Run

__all__ = ["guard", "seconds", "train"]

_POINT = "whole.json"


class _NotFinite(Exception):  # noqa: N818
    """The loss, or a weight, is NaN or infinite."""


class _Unwritten(Exception):  # noqa: N818
    """A saved state could not be written."""


def guard(trainer: Any, run: Run) -> Any:
    """Make a trainer check its loss, and mark the saved states that it has written completely.

    Raises:
        ConfigError: its processes would write shards of weights, from which no Checkpoint can be made.
    """
    import torch
    from accelerate.utils import DistributedType

    _check_whole(trainer.accelerator.state, adapters=run.config.lora is not None)
    kind = type(trainer)
    begun = time.monotonic() - seconds(run.work)
    passes = {"update": -1, "number": 0}

    class Guarded(kind):  # type: ignore[misc,valid-type]
        """The stage's trainer, guarded."""

        def _run_epoch(self, **settings: Any) -> None:
            """Train, unless the run is over: resumed after its last update, or stopped before its first."""
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
            if not self.control.should_training_stop:
                super()._run_epoch(**settings)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step
            passes["number"] = passes["number"] + 1 if passes["update"] == step else 1
            passes["update"] = step
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not torch.isfinite(loss).all():
                raise _NotFinite(
                    f"the loss is {loss.item()} at update {step + 1}, forward pass {passes['number']}"
                    + _beginnings(inputs, run.tokenizer)
                )
            return loss

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            split = (DistributedType.FSDP, DistributedType.DEEPSPEED)
            if self.accelerator.distributed_type not in split:
                for name, weight in self.model.named_parameters():
                    if weight.requires_grad and not torch.isfinite(weight).all():
                        raise _NotFinite(
                            f"{name} is no number any more after update {self.state.global_step}"
                        )
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    _mark(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}", begun)
            except partial.unwritable() as error:
                raise _Unwritten(str(error)) from error

        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            """Write tied weights once; FSDP gathers a copy for each name."""
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            for name, same in tied.items():
                if state_dict is not None and same in state_dict:
                    state_dict.pop(name, None)
            super()._save(output_dir, state_dict)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write no card: the Checkpoint's own card describes its origin."""

    trainer.__class__ = Guarded
    return trainer


def _check_whole(state: Any, *, adapters: bool) -> None:
    fsdp, zero = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None and fsdp.state_dict_type.name != "FULL_STATE_DICT":
        raise ConfigError(
            f"fsdp_state_dict_type is {fsdp.state_dict_type.name}, which writes parts of weights; a "
            "checkpoint is whole: set FULL_STATE_DICT in accelerate's config"
        )
    if zero is not None and zero.zero_stage == 3 and not zero.zero3_save_16bit_model:
        raise ConfigError(
            "ZeRO stage 3 writes parts of weights; a checkpoint is whole: set zero3_save_16bit_model: true "
            "in accelerate's config"
        )
    if zero is not None and zero.zero_stage == 3 and adapters:
        raise ConfigError(
            "lora under ZeRO stage 3 may wait for ever; set zero_stage: 2 or use FSDP2 in accelerate's config"
        )


def _beginnings(inputs: Any, tokenizer: Any) -> str:
    """Return the beginnings of a batch's first rows, for a message that helps to find them."""
    ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
    if ids is None:
        return ""
    texts = [" ".join(tokenizer.decode(row, skip_special_tokens=True).split())[:60] for row in ids[:3]]
    return f", whose rows begin {'; '.join(map(repr, texts))}"


def train(trainer: Any, run: Run) -> None:
    """Train from the last saved state, or from the beginning if there is none.

    Raises:
        ModelError: the loss is not finite, or the state cannot be saved; names the last good saved state.
        KeyboardInterrupt: it was asked to stop, and has saved its state.
    """
    last = _last_point(run.work, trainer.accelerator)
    stop = _Interrupt()
    if trainer.accelerator.num_processes == 1:
        trainer.add_callback(stop.callback())
    try:
        with stop.heard(alone=trainer.accelerator.num_processes == 1):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if last is not None:  # transformers' own totals cover only the updates since the resumption
            for line in trainer.state.log_history:
                for name in [name for name in line if name.startswith("train_")]:
                    del line[name]
    except (_NotFinite, _Unwritten) as error:
        _clear(run.work)
        said = f"cannot write a point to go on from: {error}" if isinstance(error, _Unwritten) else str(error)
        at = _points(run.work)
        kept = f"the last good point is {at[-1]}" if at else "there is no point before it"
        do = (
            "free space and start it again"
            if isinstance(error, _Unwritten)
            else "lower learning_rate or look at these rows, and remove the folder to start again"
        )
        raise ModelError(f"{run.stage}: {said}; {kept}; {do}") from error
    if stop.asked:
        raise KeyboardInterrupt


class _Interrupt:
    """Handles Ctrl-C and SIGTERM: the first ends training after the current update, with its state saved.

    A second one ends it at once.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def heard(self, *, alone: bool) -> Iterator[None]:
        """Handle signals in the body; only if one process trains: several would stop at different updates."""
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupted(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def callback(self) -> Any:
        """Return a callback that ends training after the current update, once a stop was requested."""
        from transformers import TrainerCallback

        stop = self

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if stop.asked:
                    control.should_save = control.should_training_stop = True

        return Stop()


# --- saved states -------------------------------------------------------------------------------------


def _points(work: Path) -> list[Path]:
    """Return the complete saved states, in order."""
    found = [path.parent for path in work.glob(f"checkpoint-*/{_POINT}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _last_point(work: Path, accelerator: Any) -> Path | None:
    if accelerator.is_main_process:
        _clear(work)
    accelerator.wait_for_everyone()
    found = _points(work)
    return found[-1] if found else None


def _clear(work: Path) -> None:
    """Remove incomplete saved states: those that were being written when the run ended."""
    for path in work.glob("checkpoint-*"):
        if not (path / _POINT).exists():
            shutil.rmtree(path)


def _mark(point: Path, begun: float) -> None:
    atomic.sync(point)
    atomic.write(point / _POINT, json.dumps({"seconds": time.monotonic() - begun}))


def seconds(work: Path) -> float:
    """Return the seconds of training up to the last saved state; 0 where there is none."""
    points = _points(work)
    return float(json.loads((points[-1] / _POINT).read_text(encoding="utf-8"))["seconds"]) if points else 0.0
