"""Online training: RLOO and GRPO over TRL's trainers, with any reward, monitored by the Goodhart watch.

RLOO (Ahmadian et al. 2024, arXiv:2402.14740) is REINFORCE with the other answers to a prompt as the baseline,
which is how Lee et al. 2023 (arXiv:2309.00267) trained RLAIF; GRPO (Shao et al. 2024, arXiv:2402.03300) also
divides by the group's standard deviation. Both sample `answers` to each prompt and learn from how these
compare. Differences from TRL's defaults:

    beta       0.05 for both. TRL's GRPO has none, and a learned reward without an anchor is soon exploited.
    reference  the model that training starts from, read from its folder, also after a resumption.
    dropout    none: answers are sampled from the same probabilities that are trained.
    reward     a Reward of trainers/rewards.py, which returns a number for every answer or raises. TRL skips
               answers without a reward, and goes on without a gradient if none has one; here the run is
               paused, with a saved state to resume from.
    watch      measures every update, stops the run and restores its best weights; see trainers/watch/.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_graph.errors import CaiError, ConfigError
from trainers import atomic
from trainers.checkpoint import Checkpoint
from trainers.config import above, at_least
from trainers.identity import identity_of_reward
from trainers.policy import Messages, Policy, sample, seed_of
from trainers.rewards import EnsembleReward, Reward, RewardError, Spec, constitutions, folders, parse
from trainers.stages import Run, StageConfig, run
from trainers.stages.prompts import prompt_shape
from trainers.stages.sharded import reshard
from trainers.watch import Decision, Watch, WatchConfig

if TYPE_CHECKING:
    import torch

__all__ = ["Config", "Vllm", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """Answers are sampled with vLLM, through TRL, which sends it the new weights after every update."""

    mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: on the GPUs that train; `server`: on a separate server."""
    url: str | None = None
    """Address of the server, such as http://10.0.0.2:8000; only for `server`."""

    def __post_init__(self) -> None:
        if (self.url is not None) != (self.mode == "server"):
            raise ConfigError("vllm.url is the address of the server, and goes with vllm.mode server alone")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of online training. A row is an answer: batch_size counts answers, not prompts."""

    reward: Spec
    """The reward that the policy is trained on, as `trainers.rewards.parse` reads it."""
    watch: WatchConfig | None
    """When the run is measured and when it is stopped; null: no watch."""
    algorithm: Literal["rloo", "grpo"] = "rloo"
    """RLOO, or GRPO."""
    learning_rate: float = 1e-6
    """Highest learning rate, of AdamW; with adapters 1e-5 is usual."""
    answers: int = 4
    """Answers sampled per prompt, at least 2; batch_size x accumulate x processes is a multiple of it."""
    max_answer: int = 256
    """Maximum tokens of an answer; a prompt has at most max_tokens minus this."""
    temperature: float = 1.0
    """Sampling temperature of the answers, including those for the watch."""
    beta: float = 0.05
    """Price of a nat of KL to the model that training starts from; 0: no KL penalty."""
    vllm: Vllm | None = None
    """Sample the answers with vLLM; null: with the model itself."""

    @property
    def learns_from(self) -> tuple[Path, ...]:
        """Folders of the reward models."""
        return tuple(folders(self.reward))

    @property
    def contents(self) -> dict[str, Any]:
        """Identities of the reward's and the watch's contents, by setting; see `trainers.identity`."""
        watched = {} if self.watch is None else self.watch.contents
        of_watch = {f"watch.{setting}": named for setting, named in watched.items()}
        return {"reward": identity_of_reward(self.reward), **of_watch}

    def fewest(self, processes: int) -> tuple[int, str]:
        """Return the minimum number of prompts for this many processes, and what needs that many."""
        answers = f"batch_size {self.batch_size} x accumulate {self.accumulate} x {processes} processes"
        return self.batch_size * self.accumulate * processes // self.answers, (
            f"of one update ({answers} / answers {self.answers}); lower batch_size or accumulate"
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None:
            self.lora.refuse_dropout("online training")
        if self.answers < 2:
            raise ConfigError(f"answers is a number from 2, for they are compared; found {self.answers!r}")
        if not 1 <= self.max_answer < self.max_tokens:
            raise ConfigError(
                f"max_answer is a number from 1 to below max_tokens {self.max_tokens}, found "
                f"{self.max_answer!r}"
            )
        above(0, self, "temperature")
        at_least(0, self, "beta")

    def check_processes(self, count: int) -> None:
        """Check that an update can be divided among this many processes.

        Raises:
            ConfigError: the answers of an update are not a multiple of the answers per prompt.
        """
        update = self.batch_size * self.accumulate * count
        if update % self.answers:
            fits = ", ".join(str(n) for n in range(2, update + 1) if update % n == 0) or "none"
            raise ConfigError(
                f"an update has {update} answers (batch_size {self.batch_size} x accumulate "
                f"{self.accumulate} x {count} processes), which is no multiple of answers "
                f"{self.answers}; answers that would do: {fits}"
            )


def train(config: Config) -> Checkpoint:
    """Train on prompts, and return the Checkpoint; if the watch stopped the run, that of its best step.

    Rows are `prompt`, a list of messages or one user message as text; the test rows are the held-out prompts
    of the watch. The manifest's `data` records under `watch` what the watch did.

    Raises:
        RewardError: the reward or the judge failed in all attempts. The run is kept, with a saved state of
            the last update, and resumes when it is started again.
        CaiError: as documented in `trainers.stages.run`.
    """
    config.check_processes(int(os.environ.get("WORLD_SIZE", "1")))
    reward = parse(config.reward)
    if config.vllm is not None:
        _check_vllm()
    shape = prompt_shape("online", config.max_answer)
    return run(config, shape, lambda begun: _trainer(begun, config, reward))


def _check_vllm() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ConfigError("vllm: is not installed here; pip install vllm, or leave vllm out")


def _trainer(begun: Run, config: Config, reward: Reward) -> Any:
    import trl

    settings: dict[str, Any] = {
        **begun.arguments(),
        "num_generations": config.answers,
        "max_completion_length": config.max_answer,
        "temperature": config.temperature,
        "beta": config.beta,
        # TRL sets a different seed in each process; the order of the prompts depends on the config's seed.
        "shuffle_dataset": True,
    }
    if config.vllm is not None:
        settings |= {"use_vllm": True, "vllm_mode": config.vllm.mode}
        settings |= {"vllm_server_base_url": config.vllm.url} if config.vllm.url else {}
    heldout = [] if begun.test is None else [json.loads(row["prompt"]) for row in begun.test]
    begun.test = None  # the watch measures on them; TRL would sample answers to them a second time
    begun.counts["constitutions"] += constitutions(reward)
    paid = _Paid(reward)
    name = config.algorithm.upper()
    # TRL imports its trainers lazily, and lists them in no __all__.
    arguments: Any = getattr(trl, f"{name}Config")(**settings)
    trainer: Any = getattr(trl, f"{name}Trainer")(
        model=begun.model(dropout=False),
        reward_funcs=paid.function,
        args=arguments,
        train_dataset=begun.train,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )
    trainer.data_collator = _decoded
    paid.trainer = trainer
    if config.watch is not None:
        _Watched(trainer, begun, config, config.watch, reward, heldout, paid).attach()
    return trainer


def _decoded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "prompt": json.loads(row["prompt"])} for row in rows]


# --- the reward ---------------------------------------------------------------------------------------


class _Paid:
    """A Reward as a function for TRL; remembers the last answers and their rewards, for the watch."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.trainer: Any = None
        self.prompts: list[Messages] = []
        self.answers: list[str] = []
        self.rewards: list[float] = []
        self.disagreement: list[float] | None = None

    @property
    def function(self) -> Callable[..., list[float]]:
        """The function that TRL calls; TRL names its metrics after the function."""

        def paid(prompts: list[Messages], completions: list[Any], **_: Any) -> list[float]:
            return self._pay(prompts, [answer[-1]["content"] for answer in completions])

        paid.__name__ = self.reward.name.rpartition("/")[2]
        return paid

    def _pay(self, prompts: list[Messages], answers: list[str]) -> list[float]:
        error: CaiError | None = None
        try:
            self.rewards = self.reward(prompts, answers)
            if isinstance(self.reward, EnsembleReward):
                self.disagreement = self.reward.disagreement(prompts, answers)
        except CaiError as found:
            error = found
        _paused_on(error, self.trainer)
        self.prompts, self.answers = prompts, answers
        return self.rewards

    def forget(self) -> None:
        """Discard the answers and rewards that the watch has seen."""
        self.prompts, self.answers, self.rewards, self.disagreement = [], [], [], None


def _paused_on(error: CaiError | None, trainer: Any) -> None:
    """Pause the run if any process has an error: save a state of the last update, and raise.

    Raises:
        RewardError: a process has an error; the message describes how to resume.
    """
    errors = _gathered(None if error is None else str(error))
    said = next((one for one in errors if one is not None), None)
    if said is None:
        return
    step, work = trainer.state.global_step, Path(trainer.args.output_dir)
    if step and not (work / f"checkpoint-{step}").exists():
        trainer._save_checkpoint(trainer.model, None)
    raise RewardError(
        f"{said}. Training is paused after update {step}, and no update was made without a reward; start the "
        f"same command again when the reward is back, and it goes on from {work}"
    ) from error


# --- the watch ----------------------------------------------------------------------------------------


class _Watched:
    """Runs the watch in the main process; all processes sample its answers, since weights may be sharded."""

    def __init__(
        self,
        trainer: Any,
        begun: Run,
        config: Config,
        watched: WatchConfig,
        reward: Reward,
        heldout: list[Messages],
        paid: _Paid,
    ) -> None:
        _check_sharding(trainer.accelerator)
        self.trainer, self.begun, self.config, self.paid = trainer, begun, config, paid
        self.texts: list[str] = []
        self.asks = watched.asks(heldout)
        self.watch: Watch | None = None
        if trainer.accelerator.is_main_process:
            self.watch = Watch.of(
                watched, reward=reward, heldout=heldout, sample=lambda _: self.texts, output=begun.beside
            )
        self.stopped: str | None = None

    def attach(self) -> None:
        """Register a callback that runs the watch."""
        from transformers import TrainerCallback

        watched = self

        class Observe(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                last = state.global_step >= state.max_steps
                if watched.begin(state.global_step, last=last):
                    control.should_training_stop = True

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                last = state.global_step >= state.max_steps
                if watched.observe(state.global_step, last=last):
                    control.should_save = control.should_training_stop = True

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watched.end(state.global_step)

        self.trainer.add_callback(Observe())

    def begin(self, step: int, *, last: bool) -> bool:
        """Let the watch measure the policy before training begins or resumes, or apply its recorded decision.

        Returns:
            Whether the run is over: the watch stopped it before an interrupt, or stops it now.
        """
        decision = _agreed(None if self.watch is None else self.watch.decided(step, last=last))
        return self.observe(step, last=last) if decision is None else self._do(decision, step)

    def observe(self, step: int, *, last: bool) -> bool:
        """Return whether the run is to stop after this step."""
        if _agreed(self.watch is not None and self.watch.due(step, last)):
            self.texts = self._answers(step)
        paid = _gathered((self.paid.prompts, self.paid.answers, self.paid.rewards, self.paid.disagreement))
        prompts, answers, rewards, spreads = zip(*paid, strict=True)
        decision: Decision | None = None
        error: CaiError | None = None
        if self.watch is not None:
            try:
                decision = self.watch.observe(
                    step=step,
                    kl=self._kl(),
                    entropy=self._figure("entropy", self.config.accumulate),
                    prompts=list(chain(*prompts)),
                    answers=list(chain(*answers)),
                    rewards=list(chain(*rewards)),
                    disagreement=None if None in spreads else list(chain(*spreads)),
                    last=last,
                )
            except CaiError as found:
                error = found
        _paused_on(error, self.trainer)
        self.paid.forget()
        decision = _agreed(decision)
        assert decision is not None
        self._log(decision)
        return self._do(decision, step)

    def _do(self, decision: Decision, step: int) -> bool:
        """Save the best weights, and return whether the run is to stop after this step."""
        if decision.is_best:
            self._save(step)
        self.stopped = decision.stop
        return decision.stop is not None

    def end(self, step: int) -> None:
        """If the run was stopped, restore the best weights; record the result of the watch."""
        best = _agreed(None if self.watch is None else self.watch.best_step)
        if self.stopped is not None:
            _load(self.trainer, self._path(best))
            self.begun.weights_of_step = best
        if self.watch is not None:
            self.watch.plot()
            self.begun.counts["watch"] = {
                "stopped_at": None if self.stopped is None else step,
                "reason": self.stopped,
                "weights_of_step": step if self.stopped is None else best,
                "best_step": best,
            }

    def _answers(self, step: int) -> list[str]:
        """Sample answers for the watch, anew each time: its `patience` must not count one sample twice."""
        from accelerate.utils import DistributedType

        trainer = self.trainer
        policy = Policy(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)
        found = sample(
            policy,
            self.asks,
            max_tokens=self.config.max_answer,
            temperature=self.config.temperature,
            seed=seed_of(self.config.seed, step),
            batch_size=self.config.batch_size,
            in_step=trainer.accelerator.distributed_type == DistributedType.FSDP,
        )
        return [one.text for one in found]

    def _kl(self) -> float | None:
        """Return the KL of the last update in nats per answer; TRL reports the mean per token.

        RLOO measures it once over all answers of an update, so it is exact; GRPO measures it in each forward
        pass, and the mean over passes gives short answers slightly more weight.
        """
        a_token = self._figure("kl", 1 if self.config.algorithm == "rloo" else self.config.accumulate)
        tokens = self._figure("completions/mean_length", 1)
        return None if a_token is None or tokens is None else a_token * tokens

    def _figure(self, name: str, count: int) -> float | None:
        """Return a metric of the last update in TRL's record, as the mean of its last `count` values."""
        values = self.trainer._metrics["train"].get(name, [])[-count:]
        return sum(values) / len(values) if values else None

    def _log(self, decision: Decision) -> None:
        if self.watch is None:
            return
        reading = self.watch.readings[-1]
        figures = self.trainer._metrics["train"]
        for name, value in asdict(reading).items():
            if value is not None and name not in ("step", "kl", "entropy", "reward"):
                figures[f"watch/{name}"].append(value)
        figures["watch/best_step"] = [float(decision.best_step)]
        for said in (*decision.warnings, *([decision.stop] if decision.stop else [])):
            _log.warning("step %s: %s", reading.step, said)

    def _path(self, step: int) -> Path:
        return self.begun.work / f"best-{step}.safetensors"

    def _save(self, step: int) -> None:
        """Save the trained weights of this step; delete others that a resumed run cannot need any more."""
        tensors = _trained(self.trainer)
        if not self.trainer.accelerator.is_main_process:
            return
        from safetensors.torch import save_file

        with atomic.file(self._path(step)) as work:
            save_file(tensors, work)
        points = [int(path.name.rpartition("-")[2]) for path in self.begun.work.glob("checkpoint-*")]
        kept = {int(path.stem.rpartition("-")[2]) for path in self.begun.work.glob("best-*.safetensors")}
        reachable = max((one for one in kept if one <= max(points, default=0)), default=step)
        for one in kept - {step, reachable}:
            self._path(one).unlink()


def _check_sharding(accelerator: Any) -> None:
    from accelerate.utils import DistributedType

    state = accelerator.state
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigError("the watch cannot go back to weights under ZeRO stage 3; use stage 2, or FSDP2")
    if accelerator.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("the watch cannot go back to weights under FSDP 1; set fsdp_version: 2")


def _trained(trainer: Any) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights, whole and on the CPU; all processes must call it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(model)
    found = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            found[name] = whole.detach().cpu().clone().contiguous()
    return found


def _load(trainer: Any, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    trainer.accelerator.wait_for_everyone()
    kept = load_file(path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                whole = kept[name].to(weight.device)
                if hasattr(weight, "full_tensor"):
                    from torch.distributed.tensor import distribute_tensor

                    whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
                weight.copy_(whole)


# --- processes ----------------------------------------------------------------------------------------


def _agreed(value: Any) -> Any:
    """Return the main process's value in every process."""
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]


def _gathered(value: Any) -> Sequence[Any]:
    """Return the values of all processes in every process."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found
