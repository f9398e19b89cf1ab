"""Builds the steps of a `cai distill` pipeline from its config: each step's inputs, settings and work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cai_graph import bulk, chain, local, models
from cai_graph import constitution as constitutions
from cai_graph.addresses import without_password
from cai_graph.calls import UNATTENDED_SECONDS, Budget
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, DataError
from cai_graph.faces.chat import ConstitutionalChatModel
from cai_graph.log import open_log
from cai_graph.log.transfer import export as export_log
from cai_graph.log.transfer import import_
from cai_graph.trajectory import Outcome
from trainers import dataset, weights
from trainers.checkpoint import Checkpoint
from trainers.config import plain
from trainers.dataset.recipe import Recipe
from trainers.distill import checks
from trainers.distill.config import Config, Section
from trainers.distill.pipeline import (
    CHECKPOINT,
    EVALUATION,
    LOG,
    ROWS,
    Done,
    Folders,
    Pipeline,
    Step,
    Tell,
)
from trainers.distill.publish import link, publish
from trainers.distill.report import REPORT, report
from trainers.distill.sampler import Sampler
from trainers.distill.sizes import Size
from trainers.distill.training import Training
from trainers.distill.who import chat, critic, unasked, unasked_reward
from trainers.evaluation.folder import Evaluation, has_failed
from trainers.evaluation.generations import CheckpointSubject
from trainers.evaluation.graders import graders_for
from trainers.evaluation.grades import Grader
from trainers.evaluation.suites import Prompt, Suite, data_of, read_suite, summed_up, trained_on
from trainers.evaluation.summary import summarise
from trainers.feedback import Config as Labels
from trainers.feedback import Labelling
from trainers.feedback.judge import Judge
from trainers.identity import identity, identity_of_reward
from trainers.rows import Kind

__all__ = ["pipeline", "train"]

OnProgress = Callable[[str, int, int], None]
"""Callback with the name of what is counted, the number done, and the total."""

T = TypeVar("T")


def pipeline(config: Config, progress: OnProgress = lambda what, done, total: None) -> Pipeline:
    """Return the steps of a config, after all checks that need no work of a step.

    Raises:
        ConfigError: a section has an unknown key or a value that cannot work, or a file is missing.
        ConstitutionError: the constitution cannot be read.
        DataError: the prompts cannot be read.
    """
    steps = Pipeline(config.output, _Plan(config, progress).steps())
    steps.check()
    return steps


def train(
    config: Config, tell: Tell, progress: OnProgress = lambda what, done, total: None
) -> tuple[Checkpoint, Path]:
    """Run the steps that are not done; return the trained model in `config.output`, and the report's path.

    Raises:
        StepFailed: a step ended with an error; names the step. The next run resumes from there.
        CaiError: an error of `pipeline`.
    """
    steps = pipeline(config, progress)

    def finish(done: Mapping[str, Done]) -> None:
        publish(done["model"].path, config.output)
        report(config.output, config, steps, done)

    steps.run(tell, finish)
    return Checkpoint.open(config.output), config.output / REPORT


class _Plan:
    """Builds the steps of one config, each with its work."""

    def __init__(self, config: Config, progress: OnProgress) -> None:
        self.config, self.progress = config, progress
        self.rules = constitutions.load(config.constitution)
        self.base = identity(config.model)
        missing = [str(path) for path in config.evaluation.suites.values() if not path.exists()]
        if missing:
            raise ConfigError(f"evaluation: {', '.join(missing)} is not there")
        if config.prompts is not None and not config.prompts.exists():
            raise ConfigError(f"prompts: {config.prompts} is not there")
        trajectories = self._trajectories()
        self.size = Size.of(config, self._copy(trajectories))
        self.trajectories = replace(trajectories, needs=self.size.drafts())

    def steps(self) -> list[Step]:
        config = self.config
        section = {key: value for key, value in config.rl.items() if key != "method"}
        trajectories = self.trajectories
        sft_data = self._dataset("sft-data", "sft", trajectories)
        sft = self._trained("sft", "sft", config.sft, data=sft_data)
        steps = [trajectories, sft_data, sft]
        labels: dict[str, Step] = {}
        if config.method == "dpo" or (self._against_model and "data" not in config.reward):
            feedback = self._feedback(trajectories, sft)
            labels["data"] = self._dataset("preferences", "preference", feedback)
            steps += [feedback, labels["data"]]
        if config.method == "dpo":
            last = self._trained("dpo", "dpo", section, model=sft, **labels)
        else:
            made = {"model": sft, "data": self._dataset("prompts", "prompts", trajectories)}
            if self._against_model:
                made["reward"] = self._trained("reward", "reward", config.reward, **labels)
                steps.append(made["reward"])
            steps.append(made["data"])
            stage = "ppo" if config.method == "ppo" else "online"
            if stage == "online":
                section["algorithm"] = config.method
            last = self._trained(config.method, stage, section, **made)
        steps.append(last)
        if config.evaluation.suites:
            steps.append(self._evaluation(sft, last))
        return [*steps, self._model(last)]

    @property
    def _against_model(self) -> bool:
        """Whether the pipeline trains a reward model, and the policy on that."""
        return self.config.method != "dpo" and "reward" not in self.config.rl

    # --- trajectories ---

    def _trajectories(self) -> Step:
        config, drafts = self.config, self.config.drafts
        settings: dict[str, Any] = {
            "constitution": self.rules.digest,
            "logs": [without_password(url) for url in config.logs],
            "as_of": config.logs_as_of,
        }
        if config.prompts is not None:
            shaping = {key: value for key, value in plain(drafts).items() if key != "concurrency"}
            shaping |= {who: identity(getattr(drafts, who)) for who in ("model", "critic", "reviser")}
            prompts = {"sha256": sha256_of(config.prompts), "column": config.column, "limit": config.limit}
            settings |= {"prompts": prompts, "drafts": shaping, "seed": config.seed}
            if drafts.model is None:
                settings["model"] = self.base

        def work(folders: Folders) -> dict[str, Any]:
            url = f"sqlite:///{folders.own / LOG}"
            copied = 0
            for number, log in enumerate(config.logs):
                copy = folders.own / f"copy-{number}.jsonl"
                if not copy.exists():
                    export_log(log, copy)
                copied += (found := import_(url, copy)).records + found.present
            summary = self._answer(url) if config.prompts is not None else None
            for copy in folders.own.glob("copy-*.jsonl"):
                copy.unlink()
            with open_log(url, read_only=True) as opened:
                stats = opened.stats()
            # The log also has the failed trajectories of rows, besides those of later attempts.
            count = stats.trajectories - stats.outcomes.get(Outcome.FAILED, 0)
            if not count:
                raise DataError("there is no trajectory to learn from")
            figures: dict[str, Any] = {"trajectories": count, "copied": copied}
            if summary is not None:
                figures |= {
                    "outcomes": dict(summary.outcomes),
                    "input_tokens": summary.input_tokens,
                    "output_tokens": summary.output_tokens,
                    "skipped": len(summary.skipped),
                }
            return figures

        def check() -> None:
            if config.prompts is not None:
                with checks.in_section("drafts"):
                    self._guarded(None, named=unasked)

        return Step(name="trajectories", settings=settings, work=work, check=check)

    def _copy(self, trajectories: Step) -> Path | None:
        """Return the path of the finished step's log; None if the step is not finished."""
        steps = Pipeline(self.config.output, [trajectories])
        copy = steps.path(trajectories) / LOG
        return copy if steps.state(trajectories) == "done" and copy.exists() else None

    def _guarded(
        self, log: str | None, *, named: Callable[[str], str] = str
    ) -> tuple[Any, ConstitutionalChatModel]:
        """Return the model that drafts, alone and under the constitution; `named` is applied to each spec."""
        config, drafts = self.config, self.config.drafts
        shaped = {"temperature": drafts.temperature, "seed": config.seed}
        who = named(drafts.model or config.model)
        drafter = chat(who, max_tokens=drafts.max_tokens, **shaped)
        reviser = chat(
            named(drafts.reviser) if drafts.reviser else who, max_tokens=2 * drafts.max_tokens, **shaped
        )
        rounds: dict[str, Any] = {} if drafts.max_rounds is None else {"max_rounds": drafts.max_rounds}
        guarded: ConstitutionalChatModel = chain.constitutional(
            drafter,
            constitution=self.rules,
            critic=drafts.critic and named(drafts.critic),
            reviser=reviser,
            log=log,
            strategy=drafts.strategy,
            seed=config.seed,
            on_log_error="raise",
            budget=Budget(seconds=UNATTENDED_SECONDS),
            **rounds,
        )
        return drafter, guarded

    def _answer(self, url: str) -> bulk.Summary:
        """Answer the prompts that are not answered yet, and log the trajectories to `url`."""
        config, drafts = self.config, self.config.drafts
        drafter, guarded = self._guarded(url)
        assert config.prompts is not None
        assert guarded.plan.log is not None
        with contextlib.closing(bulk.Rows(str(config.prompts))) as rows, contextlib.closing(guarded.plan.log):
            drafting = {"model": models.name_of(drafter), "max_tokens": drafts.max_tokens}
            job = bulk.Run(guarded, rows, drafting=drafting, column=config.column, limit=config.limit)
            failures = self._follow(
                "prompts",
                job.results(drafts.concurrency),
                job.done,
                job.rows,
                lambda row: row.why if isinstance(row, bulk.Failed) else None,
            )
        _check_failures(failures, job.rows, f"prompts of {config.prompts} were not answered")
        if not job.summary.answered:
            first = job.summary.skipped[0].why if job.summary.skipped else "the file holds none"
            raise DataError(f"no prompt of {config.prompts} was answered: {first}")
        return job.summary

    # --- rows ---

    def _dataset(self, name: str, kind: Kind, source: Step) -> Step:
        rows = self.config.rows
        held_out = {str(path): sha256_of(path) for path in self.config.evaluation.suites.values()}
        recipe = Recipe(
            kind=kind,
            test_share=rows.test_share,
            near_duplicates=rows.near_duplicates or None,
            kept_per_revised=rows.kept_per_revised if kind == "sft" else None,
            per_user=rows.per_user,
            personal_data=rows.personal_data,
            held_out=tuple(held_out),
        )
        settings = {**plain(recipe), "held_out": sorted(held_out.values())}

        def work(folders: Folders) -> dict[str, Any]:
            target = folders.own / ROWS
            if not target.exists():
                dataset.build([f"sqlite:///{folders[source.name] / LOG}"], target, recipe)
            ledger = dataset.read_manifest(target)["ledger"]
            return {"rows": sum(ledger["kept"].values()), "ledger": ledger}

        return Step(name=name, settings=settings, inputs=(source,), work=work)

    # --- training ---

    def _trained(self, name: str, stage: str, section: Section, **made: Step) -> Step:
        """Return a step that trains a stage; `made` maps the stage's settings to the steps that make them."""
        training = Training(
            config=self.config, base=self.base, size=self.size, stage=stage, section=section, made=made
        )
        return training.step(name)

    # --- feedback ---

    def _feedback(self, trajectories: Step, sft: Step) -> Step:
        config, feedback = self.config, self.config.feedback
        settings = {
            **{key: value for key, value in plain(feedback).items() if key != "concurrency"},
            **{who: identity(getattr(feedback, who)) for who in ("judge", "critic", "sampler")},
            "constitution": self.rules.digest,
            "seed": config.seed,
        }

        def work(folders: Folders) -> dict[str, Any]:
            url = f"sqlite:///{folders.own / LOG}"
            with (
                open_log(f"sqlite:///{folders[trajectories.name] / LOG}", read_only=True) as source,
                contextlib.closing(open_log(url)) as log,
            ):
                for commit in [log.append(record) for record in source.read()]:
                    commit.result()
                return self._label(log, folders[sft.name] / CHECKPOINT)

        def check() -> None:
            with checks.in_section("feedback"):
                self._labelling(_NoRecords(), Path(sft.name), named=unasked)

        return Step(
            name="feedback",
            settings=settings,
            inputs=(trajectories, sft),
            work=work,
            check=check,
            needs=self.size.feedback(),
        )

    def _labelling(self, log: Any, checkpoint: Path, *, named: Callable[[str], str] = str) -> Labelling:
        """Return the Labelling that compares the answers in a log; `named` is applied to each spec."""
        config, feedback = self.config, self.config.feedback
        sampler = None
        if "samples" in feedback.pairs:
            drawn: dict[str, Any] = {
                "max_tokens": feedback.max_tokens,
                "temperature": feedback.temperature,
            }
            if feedback.sampler is None:
                sampler = Sampler(path=checkpoint, seed=config.seed, **drawn)
            else:  # without a seed, with which all samples of a prompt would be the same
                sampler = chat(named(feedback.sampler), **drawn)
        spec = feedback.judge or feedback.critic
        assert spec is not None
        spec = named(spec)
        return Labelling(
            log,
            Judge(chat(spec)) if feedback.judge else critic(spec),
            self.rules,
            Labels(
                pairs=feedback.pairs,
                principles=feedback.principles,
                samples=feedback.samples,
                seed=config.seed,
                limit=feedback.limit,
            ),
            sampler=sampler,
            sampling=f"{feedback.temperature:g}/{feedback.max_tokens}",
        )

    def _label(self, log: Any, checkpoint: Path) -> dict[str, Any]:
        job = self._labelling(log, checkpoint)
        results = job.results(self.config.feedback.concurrency)
        failures = self._follow("comparisons", results, job.done, job.total, lambda result: result.failed)
        _check_failures(failures, job.total, "trajectories could not be labelled")
        return {"failed": len(failures), "positions": job.positions.summary()}

    def _follow(
        self,
        what: str,
        results: AsyncGenerator[T, None],
        done: int,
        total: int,
        failed: Callable[[T], str | None],
    ) -> list[str]:
        """Consume all results of a job and report progress; return the errors of the failed ones."""
        failures: list[str] = []

        async def work() -> None:
            number = done
            self.progress(what, number, total)
            async with contextlib.aclosing(results):
                async for result in results:
                    number += 1
                    if (why := failed(result)) is not None:
                        failures.append(why)
                    self.progress(what, number, total)

        asyncio.run(work())
        return failures

    # --- evaluation and result ---

    def _evaluation(self, sft: Step, last: Step) -> Step:
        wanted = self.config.evaluation
        files = {name: sha256_of(path) for name, path in wanted.suites.items()}
        settings = {
            **plain(wanted),
            "harmlessness": files.get("harmlessness"),
            "helpfulness": files.get("helpfulness"),
            "over_refusal": files.get("over-refusal"),
            "critic": identity(wanted.critic),
            "reward": [identity_of_reward(spec) for spec in wanted.reward],
            "refusals": identity(wanted.refusals),
            "constitution": self.rules.digest,
            "seed": self.config.seed,
            "model": self.base,
        }

        def work(folders: Folders) -> dict[str, Any]:
            subjects = {
                "base": weights.resolve(self.config.model),
                sft.name: folders[sft.name] / CHECKPOINT,
                last.name: folders[last.name] / CHECKPOINT,
            }
            return self._evaluate(folders.own / EVALUATION, subjects)

        def check() -> None:
            with checks.in_section("evaluation"):
                prompts = self._prompts()
                self._gaps(prompts)
                for suite in dict.fromkeys(prompt.suite for prompt in prompts):
                    self._graders(suite, asking=False)

        return Step(
            name="evaluation",
            settings=settings,
            inputs=(sft, last),
            work=work,
            check=check,
            needs=self.size.evaluation(),
        )

    def _prompts(self) -> list[Prompt]:
        wanted = self.config.evaluation
        return [
            prompt
            for suite, path in wanted.suites.items()
            for prompt in read_suite(suite, path, wanted.limit)
        ]

    def _gaps(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return descriptions of unknown training data, other than the pipeline's own rows.

        Raises:
            DataError: the known training data contains some of the prompts.
        """
        data, unknown = data_of(self.config.model)
        if self._against_model and "data" in self.config.reward:
            data.append(Path(self.config.reward["data"]).expanduser())
        seen, unread = trained_on(prompts, data)
        if seen:
            raise DataError(f"{summed_up(seen, prompts)}; give prompts that were held out")
        return [f"{why}: some prompts may be among it" for why in [*unknown, *unread]]

    def _evaluate(self, folder: Path, subjects: Mapping[str, Path]) -> dict[str, Any]:
        wanted = self.config.evaluation
        prompts = self._prompts()
        kept = Evaluation.begin(folder, prompts, notes=self._gaps(prompts))

        async def work() -> None:
            for name, path in subjects.items():
                subject = CheckpointSubject(
                    path,
                    name=name,
                    max_tokens=wanted.max_tokens,
                    seed=self.config.seed,
                    batch_size=wanted.batch_size,
                )
                await kept.generate(subject, progress=partial(self.progress, f"answers of {name}"))
            for suite in kept.suites():
                for grader in self._graders(suite):
                    who = f"{suite}, by {grader.name}"
                    if not await kept.grade(suite, grader, partial(self.progress, who)):
                        continue
                    rows = [row for found in kept.grades(suite)[grader.name].values() for row in found]
                    failures = [row["error"] for row in rows if has_failed(row)]
                    _check_failures(failures, len(rows), f"answers could not be graded ({who})")

        asyncio.run(work())
        return summarise(kept).json()

    def _graders(self, suite: Suite, *, asking: bool = True) -> list[Grader]:
        """Return the graders of a suite's answers; without `asking`, no server is queried for its model."""
        wanted = self.config.evaluation
        named: Callable[[str], str] = str if asking else unasked
        return graders_for(
            suite,
            self.rules,
            critic=None if wanted.critic is None else critic(named(wanted.critic)),
            reward=wanted.reward if asking else map(unasked_reward, wanted.reward),
            refusals=None if wanted.refusals is None else named(wanted.refusals),
        )

    def _model(self, last: Step) -> Step:
        def work(folders: Folders) -> dict[str, Any]:
            made = folders[last.name] / CHECKPOINT
            for path in made.iterdir():
                if path.is_file():
                    link(path, folders.own / path.name)
            try:
                source = weights.source_of(weights.resolve(self.config.model))
            except ConfigError:
                return {"gguf": False}  # a model without a GGUF source: other servers run its safetensors
            weights.to_gguf(made, source, folders.own / local.EXPORTED)
            return {"gguf": True}

        return Step(name="model", settings={"model": self.base}, inputs=(last,), work=work)


class _NoRecords:
    """An empty log."""

    def read(self, **_: Any) -> Iterator[Any]:
        return iter(())


def _check_failures(failures: Sequence[str], total: int, what: str) -> None:
    """Accept a few failed rows, but not so many as in an outage.

    Raises:
        DataError: more than a tenth failed.
    """
    if len(failures) * 10 > total:
        raise DataError(
            f"{len(failures)} of {total} {what}, the first: {failures[0]}; the same command tries them again"
        )
