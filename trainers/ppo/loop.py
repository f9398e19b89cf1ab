"""The training loop of PPO: sample answers, score them, update the policy on them."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cai_graph.errors import CaiError
from trainers import checkpoint
from trainers.checkpoint import Checkpoint
from trainers.config import plain
from trainers.policy import Messages, Sample, batch_of, sample, seed_of
from trainers.ppo import Config, Diverged
from trainers.ppo.formulas import adapted, gae, kl_rewards, policy_loss, value_loss, whiten
from trainers.ppo.models import ActorCritic, Batch, as_reference, load, quiet, token_logprobs
from trainers.ppo.state import Progress, States, Which, record
from trainers.ppo.ways import way_of
from trainers.rewards import EnsembleReward, RewardError, constitutions, parse
from trainers.stages import computes_in_bf16, manifest, plan
from trainers.stages.encoding import Encoder, open_data
from trainers.stages.prompts import prompt_shape, read_prompts
from trainers.stages.sharded import reshard
from trainers.watch import Decision, Watch

__all__ = ["Answer", "Run", "processes"]

_log = logging.getLogger(__name__)

ROLLOUT, SHUFFLE, PROMPTS, WATCH = range(4)
"""Purposes that seeds are derived for."""
SUMMED = ("policy_loss", "value_loss", "clipped", "moved")
"""Figures of a minibatch that are sums over its tokens: the losses, the share of tokens whose ratio is
outside 1 ± clip, and the KL by which this update moved the policy (Schulman's estimate (r - 1) - log r)."""


@dataclass
class Answer:
    """One answer of a rollout, as plain numbers, so that processes can exchange it."""

    prompt: int
    """Index of its prompt among the training prompts."""
    prompt_ids: list[int]
    """Tokens of the prompt."""
    ids: list[int]
    """Tokens of the answer."""
    text: str
    """The decoded answer."""
    ended: bool
    """Whether it ended by itself, and was not cut off at the maximum length."""
    logprobs: list[float]
    """Log-probability of each token, under the policy that drew it."""
    ref_logprobs: list[float]
    """Log-probability of each token, under the reference."""
    values: list[float]
    """Value of the text before each token."""
    entropy: float
    """Mean entropy over the tokens, in nats."""
    score: float = math.nan
    """Its reward, before the penalty for a missing end."""
    disagreement: float | None = None
    """Standard deviation of the reward between the members of an ensemble."""


class Run:
    """One PPO run. Under `accelerate launch` every process has one, and all of them run the same steps."""

    def __init__(self, config: Config) -> None:
        """Run the cheap checks, load models and prompts, and load the last saved state if there is one."""
        self.config = config
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if computes_in_bf16(config) else "no",
            log_with=list(config.report_to) or None,
            project_config=ProjectConfiguration(logging_dir=str(record(config.output) / "runs")),
        )
        self.way = way_of(self.accelerator, config)
        config.check_processes(self.accelerator.num_processes)
        self.share = config.rollout_size // self.accelerator.num_processes
        """Answers that each process draws for an update."""
        self.minibatch = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.reward = parse(config.reward, device=str(self.accelerator.device))
        shape = prompt_shape("ppo", config.max_answer)
        source = open_data(config.data, shape.kinds)
        self.states = States(config, self.accelerator, plan(config, "ppo", source))
        set_seed(config.seed)
        policy, actor, reference = load(config, self.accelerator.device)
        self.policy = policy
        encoder = Encoder(policy.tokenizer, config.max_tokens, config.allow, frozenset(policy.stops))
        self.prompts = read_prompts(source, shape, encoder, config.allow)
        self.updates = config.max_steps or max(
            1, math.floor(len(self.prompts.train) * config.epochs / config.rollout_size)
        )
        self.way.prepare(actor, reference)
        self.actor, self.optimizer, self.reference = self.way.actor, self.way.optimizer, self.way.reference
        self.watch = self._watch()
        self.watched: list[str] = []
        self.stopped: dict[str, Any] | None = None
        self.progress = self.states.load() or Progress(kl_coefficient=config.kl_coefficient)
        self._begin_unmoved()
        if self.accelerator.is_main_process:
            self.states.forget_after(self.progress.update)

    # --- the loop -------------------------------------------------------------------------------------

    def train(self, tell: Callable[[int, int], None]) -> Checkpoint:
        """Run the remaining updates, and write the Checkpoint."""
        if self.config.report_to:
            self.accelerator.init_trackers("cai-ppo", config=_scalars(plain(self.config)))
        self._take_up_watch()
        while self.progress.update < self.updates and self.stopped is None:
            started = time.perf_counter()
            update = self.progress.update + 1
            answers = self.rollout(update)
            figures = self.improve(update, answers)
            self._take_note(update, answers, figures, time.perf_counter() - started)
            self._observe(answers)
            if self.accelerator.is_main_process:
                tell(update, self.updates)
            if update % self.config.save_steps == 0 and self.stopped is None:
                self._save("state")
        return self._finish()

    def rollout(self, update: int) -> list[Answer]:
        """Sample and score the answers of an update; every process returns all of them, in the same order."""
        config, rank = self.config, self.accelerator.process_index
        mine = [self._prompt_at(update, rank * self.share + place) for place in range(self.share)]
        prompts = [self.prompts.train[number] for number in mine]
        samples = self._sample(prompts, seed_of(config.seed, update, ROLLOUT), rank)
        answers: list[Answer] = []
        for rows in _parts(torch.arange(self.share), config.batch_size):
            answers += self._read([mine[row] for row in rows], [samples[row] for row in rows])
        self._score(update, prompts, answers)
        return list(gather_object(answers))

    def improve(self, update: int, answers: list[Answer]) -> dict[str, float]:
        """Make `ppo_epochs` passes over the answers of an update, minibatch by minibatch."""
        config, accelerator = self.config, self.accelerator
        old_logprobs = _column(answer.logprobs for answer in answers)
        ref_logprobs = _column(answer.ref_logprobs for answer in answers)
        old_values = _column(answer.values for answer in answers)
        mask = _column([1.0] * len(answer.ids) for answer in answers)
        scores = torch.tensor([a.score - config.missing_eos_penalty * (not a.ended) for a in answers])

        rewards = kl_rewards(scores, old_logprobs, ref_logprobs, mask, self.progress.kl_coefficient)
        advantages, returns = gae(rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
        advantages = whiten(advantages, mask)

        self._set_rate(update)
        sums = torch.zeros(len(SUMMED) + 1)
        chance = torch.Generator().manual_seed(seed_of(config.seed, update, SHUFFLE))
        for epoch in range(config.ppo_epochs):
            for minibatch in _parts(torch.randperm(len(answers), generator=chance), self.minibatch):
                tokens = float(mask[minibatch].sum())
                mine = minibatch[accelerator.process_index :: accelerator.num_processes]
                total = torch.zeros(len(SUMMED), device=accelerator.device)
                for rows, is_last in _with_last(_parts(mine, config.batch_size)):
                    batch = self._batch([answers[row] for row in rows])
                    old = [
                        column[rows, : batch.mask.shape[1]].to(accelerator.device)
                        for column in (old_logprobs, old_values, advantages, returns)
                    ]
                    with self.way.part(is_last=is_last):
                        loss, figures = self._loss(batch, *old)
                        self.way.backward(loss / tokens * accelerator.num_processes)
                    total += figures
                means = accelerator.reduce(total, "sum").cpu() / tokens
                norm = self.way.step() if means.isfinite().all() else math.nan
                means = torch.cat([means, torch.tensor([norm])])
                if not means.isfinite().all():
                    raise self._diverged(update, epoch, means, [answers[row].prompt for row in minibatch])
                sums += means
        steps = config.ppo_epochs * len(answers) // self.minibatch
        figures_of = dict(zip((*SUMMED, "grad_norm"), (sums / steps).tolist(), strict=True))
        return {**figures_of, "explained_variance": _explained(old_values, returns, mask)}

    def _loss(
        self, batch: Batch, old_logprobs: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a forward pass, summed over its tokens, and the figures of `SUMMED`."""
        config = self.config
        with self.way.autocast():
            read = self.actor(batch, config.temperature)
        policy = policy_loss(read.logprobs, old_logprobs, advantages, config.clip)
        value = value_loss(read.values, old_values, returns, config.value_clip)
        loss = ((policy + config.value_coefficient * value) * batch.mask).sum()
        with torch.no_grad():
            change = (read.logprobs - old_logprobs) * batch.mask
            clipped = (change.exp() - 1).abs() > config.clip
            moved = change.exp() - 1 - change
            figures = torch.stack([(one * batch.mask).sum() for one in (policy, value, clipped, moved)])
        return loss, figures

    # --- parts of a rollout ---------------------------------------------------------------------------

    def _prompt_at(self, update: int, place: int) -> int:
        """Return the prompt at a position of an update: the data is repeated, shuffled anew for each pass."""
        at = (update - 1) * self.config.rollout_size + place
        number, inside = divmod(at, len(self.prompts.train))
        chance = torch.Generator().manual_seed(seed_of(self.config.seed, number, PROMPTS))
        return int(torch.randperm(len(self.prompts.train), generator=chance)[inside])

    def _sample(self, prompts: Sequence[Messages], seed: int, rank: int = 0) -> list[Sample]:
        """Sample answers to the prompts of this process, or by default to prompts that all processes share.

        Seeds are numbered by batch over all processes: no two batches have the same seed, and two processes
        draw what one would have drawn if whole batches make up their share.
        """
        at_once = min(self.config.rollout_batch, self.share)
        draw = partial(
            sample,
            self.policy,
            prompts,
            max_tokens=self.config.max_answer,
            temperature=self.config.temperature,
            seed=seed,
            first=rank * math.ceil(self.share / at_once),
            batch_size=at_once,
            in_step=self.way.in_step,
        )
        return self._unwrapped().around(draw)

    @torch.no_grad()
    def _read(self, numbers: Sequence[int], samples: Sequence[Sample]) -> Iterator[Answer]:
        """Yield answers with the log-probabilities, values and entropy of their tokens."""
        actor, temperature = self._unwrapped(), self.config.temperature
        batch = self._batch(samples)
        with self.way.autocast(), as_reference(actor, self.reference) as reference:
            ref_logprobs, _, _ = actor.around(partial(token_logprobs, reference, batch, temperature))
        with self.way.autocast():
            read = actor(batch, temperature, entropy=True)
        for row, (number, drawn) in enumerate(zip(numbers, samples, strict=True)):
            length = len(drawn.ids)
            yield Answer(
                prompt=number,
                prompt_ids=drawn.prompt_ids,
                ids=drawn.ids,
                text=drawn.text,
                ended=drawn.ended,
                logprobs=read.logprobs[row, :length].tolist(),
                ref_logprobs=ref_logprobs[row, :length].tolist(),
                values=read.values[row, :length].tolist(),
                entropy=float(read.entropy[row, :length].mean()),
            )

    def _score(self, update: int, prompts: Sequence[Messages], answers: Sequence[Answer]) -> None:
        """Score answers; if that fails in one process, all of them save their state and stop."""
        failed: RewardError | None = None
        texts = [answer.text for answer in answers]
        try:
            scores = self.reward(prompts, texts)
            for answer, score in zip(answers, scores, strict=True):
                answer.score = score
            if isinstance(self.reward, EnsembleReward):
                for answer, spread in zip(answers, self.reward.disagreement(prompts, texts), strict=True):
                    answer.disagreement = spread
        except RewardError as error:
            failed = error
        said = [one for one in gather_object([None if failed is None else str(failed)]) if one is not None]
        if said:
            raise self._paused(said[0], f"before update {update}") from failed

    def _batch(self, answers: Sequence[Answer] | Sequence[Sample]) -> Batch:
        device, pad = self.accelerator.device, self.policy.pad
        asked, of_asked = batch_of([one.prompt_ids for one in answers], pad=pad, left=True, device=device)
        said, of_said = batch_of([one.ids for one in answers], pad=pad, left=False, device=device)
        return Batch(torch.cat([asked, said], 1), torch.cat([of_asked, of_said], 1), of_said.float())

    # --- around an update -----------------------------------------------------------------------------

    def _save(self, which: Which) -> None:
        self.states.save(self.progress, which)
        self._begin_unmoved()

    def _begin_unmoved(self) -> None:
        """Before the first update, clear the optimizer step that FSDP takes in order to save a state."""
        if self.progress.update == 0:
            self.optimizer.state.clear()

    def _unwrapped(self) -> ActorCritic:
        actor: ActorCritic = self.accelerator.unwrap_model(self.actor)
        return actor

    def _set_rate(self, update: int) -> None:
        """Set the learning rates of an update, counted from 1."""
        warm = self.config.warmup * self.updates
        done = max(0.0, (update - 1 - warm) / (self.updates - warm))
        fall = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
        share = min(1.0, update / (warm + 1)) * fall[self.config.schedule]
        of_policy, of_values = self.optimizer.param_groups
        of_policy["lr"] = share * self.config.learning_rate
        of_values["lr"] = share * self.config.value_learning_rate

    def _take_note(
        self, update: int, answers: Sequence[Answer], figures: dict[str, float], seconds: float
    ) -> None:
        """Record the figures of an update, and set the KL coefficient of the next one."""
        config, progress = self.config, self.progress
        kl = _mean(sum(answer.logprobs) - sum(answer.ref_logprobs) for answer in answers)
        tokens = sum(len(answer.ids) for answer in answers)
        progress.metrics = {
            "reward": _mean(answer.score for answer in answers),
            "kl": kl,
            "kl_coefficient": progress.kl_coefficient,
            "entropy": _mean(answer.entropy for answer in answers),
            "answer_tokens": tokens / len(answers),
            "ended": _mean(float(answer.ended) for answer in answers),
            **figures,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens / seconds,
        }
        if (spread := _disagreement(answers)) is not None:
            progress.metrics["disagreement"] = _mean(spread)
        if config.kl_target is not None:
            progress.kl_coefficient = adapted(
                progress.kl_coefficient,
                kl,
                target=config.kl_target,
                horizon=config.kl_horizon,
                answers=len(answers),
            )
        progress.update = update
        progress.seconds += seconds
        if update % config.log_steps == 0 or update == self.updates:
            self.accelerator.log(progress.metrics, step=update)
            if self.accelerator.is_main_process:
                self.states.log(update, progress.metrics)

    def _diverged(self, update: int, epoch: int, means: Tensor, prompts: Sequence[int]) -> Diverged:
        state = self.states.last()
        kept = f"{state} is kept" if state else "no update was kept yet"
        rows = ", ".join(str(self.prompts.rows[number]) for number in prompts[:8])
        figures = ", ".join(
            f"{name} {value:.3g}" for name, value in zip((*SUMMED, "grad_norm"), means.tolist(), strict=True)
        )
        return Diverged(
            f"update {update}, pass {epoch + 1}: {figures}, in the minibatch of rows {rows}"
            f"{', …' if len(prompts) > 8 else ''} of {self.prompts.source.train}; {kept}. Lower "
            "learning_rate and run again, or look at these rows"
        )

    def _paused(self, said: str, when: str) -> RewardError:
        self._save("state")
        return RewardError(
            f"{said}\nPaused {when} of {self.updates}; the state is kept in {self.states.folder}, and the "
            "same command goes on from it"
        )

    # --- the watch ------------------------------------------------------------------------------------

    def _watch(self) -> Watch | None:
        """Return the watch for reward over-optimization (Goodhart's law), in the first process only."""
        if self.config.watch is None or not self.accelerator.is_main_process:
            return None
        return Watch.of(
            self.config.watch,
            reward=self.reward,
            heldout=self.prompts.heldout,
            sample=lambda _: self.watched,
            output=self.states.record,
        )

    def _answer_watch(self, *, last: bool) -> None:
        """Sample the answers the watch needs now, in every process: a sharded policy runs in all at once."""
        asks: list[Any] = [
            self.watch.asks if self.watch and self.watch.due(self.progress.update, last) else []
        ]
        broadcast_object_list(asks)
        seed = seed_of(self.config.seed, self.progress.update, WATCH)
        self.watched = [drawn.text for drawn in self._sample(asks[0], seed)] if asks[0] else []

    def _take_up_watch(self) -> None:
        """Let the watch measure the policy before training begins or resumes, or apply its old decision."""
        if self.config.watch is None:
            return
        update = self.progress.update
        found: list[Any] = [self.watch and self.watch.decided(update, last=update == self.updates)]
        broadcast_object_list(found)
        if found[0] is None:
            self._observe([])
        else:
            self._do(found[0])

    def _observe(self, answers: Sequence[Answer]) -> None:
        """Pass the results of an update to the watch, and apply its decision."""
        if self.config.watch is None:
            return
        seen: list[Any] = [None, None]
        progress = self.progress
        last = progress.update == self.updates
        self._answer_watch(last=last)
        if self.watch is not None:
            try:
                seen[0] = self.watch.observe(
                    step=progress.update,
                    kl=progress.metrics.get("kl"),
                    entropy=progress.metrics.get("entropy"),
                    prompts=[self.prompts.train[answer.prompt] for answer in answers],
                    answers=[answer.text for answer in answers],
                    rewards=[answer.score for answer in answers],
                    disagreement=_disagreement(answers),
                    last=last,
                )
            except CaiError as error:  # the other processes wait for the result below
                seen[1] = str(error)
        broadcast_object_list(seen)
        if seen[1] is not None:
            raise self._paused(seen[1], f"after update {progress.update}")
        self._do(seen[0])

    def _do(self, decision: Decision) -> None:
        """Save the best weights; if the watch stops the run, load the best weights again."""
        progress = self.progress
        if self.accelerator.is_main_process:
            for warning in decision.warnings:
                _log.warning("update %d: %s", progress.update, warning)
        if decision.is_best:
            self._save("best")
        if decision.stop is not None:
            self.stopped = {"stopped_at": progress.update, "reason": decision.stop}
            reshard(self.actor)
            best = self.states.load_best(decision.best_step)
            self.progress = replace(best, seconds=progress.seconds)
            self._begin_unmoved()

    # --- the end --------------------------------------------------------------------------------------

    def _finish(self) -> Checkpoint:
        config = self.config
        counts = {**self.prompts.counts.to_json(), "test_rows": len(self.prompts.heldout)}
        counts["constitutions"] += constitutions(self.reward)
        if config.watch is not None:
            said = self.stopped or {"stopped_at": None, "reason": None}
            counts["watch"] = {**said, "weights_of_step": self.progress.update}
        made_by = manifest(
            config,
            "ppo",
            self.prompts.source,
            counts,
            seconds=self.progress.seconds,
            metrics=self.progress.metrics,
        )
        weights = self.way.weights()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # before its files go into the Checkpoint
        self.accelerator.trackers = []
        if self.accelerator.is_main_process:
            model, tokenizer = self._unwrapped().policy, self.policy.tokenizer
            with quiet():
                checkpoint.save(
                    config.output, model, tokenizer, made_by, weights=weights, beside=self.states.record
                )
            shutil.rmtree(self.states.folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # processes that communicate with one another
        return Checkpoint(config.output, made_by)


def processes() -> PartialState:
    """Return the processes that train together, as `Run` will have them."""
    return PartialState(cpu=not torch.accelerator.is_available())


# --- small parts --------------------------------------------------------------------------------------


def _column(rows: Iterable[Sequence[float]]) -> Tensor:
    """Return (B, A) float32, each row padded on the right with 0."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _parts(rows: Tensor, size: int) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split(rows, size)
    return parts


def _with_last(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each part, and whether it is the last."""
    for number, part in enumerate(parts, 1):
        yield part, number == len(parts)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return the share of the returns' variance that the values explain; 0 where they do not vary."""
    chosen, guessed = returns[mask > 0], values[mask > 0]
    variance = float(chosen.var(correction=0))
    return 1 - float((chosen - guessed).var(correction=0)) / variance if variance > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _disagreement(answers: Sequence[Answer]) -> list[float] | None:
    found = [answer.disagreement for answer in answers if answer.disagreement is not None]
    return found or None


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float | str | bool)}
