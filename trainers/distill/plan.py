"""The steps of a pipeline: what each depends on, and what it does."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from cai_graph import bulk, chain, local, models
from cai_graph import constitution as constitutions
from cai_graph.calls import Budget
from cai_graph.chat import ConstitutionalChatModel
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.log import open_log, without_password
from cai_graph.log.transfer import export as export_log
from cai_graph.log.transfer import import_
from cai_graph.trajectory import Outcome
from trainers import dataset, weights
from trainers.checkpoint import Checkpoint
from trainers.config import plain, read
from trainers.dataset.recipe import Recipe
from trainers.distill import checks
from trainers.distill.config import Config, Section
from trainers.distill.identity import identity, identity_of_reward
from trainers.distill.launch import is_here, processes
from trainers.distill.pipeline import Folders, Needs, Pipeline, Step, Tell
from trainers.distill.publish import link, publish
from trainers.distill.report import report
from trainers.distill.sampler import Sampler
from trainers.distill.sizes import Size
from trainers.distill.who import chat, critic, unasked, unasked_reward
from trainers.feedback import Config as Labels
from trainers.feedback import Labelling
from trainers.feedback.judge import Judge
from trainers.stages.encoding import open_data

if TYPE_CHECKING:
    from trainers.evaluation.grades import Grader
    from trainers.evaluation.suites import Prompt, Suite

__all__ = ["pipeline", "train"]

Progress = Callable[[str, int, int], None]
"""Told what is counted, how many are done, and of how many."""

CHECKPOINT = "checkpoint"
_LOG = "log.db"
_ROW_SECONDS = 3600.0


def pipeline(config: Config, progress: Progress = lambda what, done, total: None) -> Pipeline:
    """Return the steps of a config; whatever can be checked without work is checked here.

    Raises:
        ConfigError: a section has an unknown key or a value that cannot work, or a file is missing.
        ConstitutionError: the constitution cannot be read.
        DataError: the prompts cannot be read.
    """
    plan = _Plan(config, progress)
    steps = Pipeline(config.output, plan.steps())
    for step, check in plan.checks:
        if steps.state(step) != "done":  # what is skipped needs no key, no package and no GPU
            check()
    return steps


def train(
    config: Config, tell: Tell, progress: Progress = lambda what, done, total: None
) -> tuple[Checkpoint, Path]:
    """Do what is not done yet; return the trained model, which is `config.output`, and the report.

    Raises:
        StepFailed: a step ended with an error; names it. The next run goes on from there.
        CaiError: what `pipeline` raises.
    """
    steps = pipeline(config, progress)
    done = steps.run(tell)
    publish(done["model"].path, config.output)
    page = report(config.output, config, steps, done)
    return Checkpoint.open(config.output), page


class _Plan:
    """The steps of one config, each with its work."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.rules = constitutions.load(config.constitution)
        self.base = {"model": identity(config.model)}
        self.processes = processes(config.launch)
        missing = [str(path) for path in config.evaluation.suites.values() if not path.exists()]
        if missing:
            raise ConfigError(f"evaluation: {', '.join(missing)} is not there")
        self.size = Size.of(config)
        self.checks: list[tuple[Step, Callable[[], None]]] = []
        """What can be checked of a step beforehand; set by `steps`."""

    def steps(self) -> list[Step]:
        config = self.config
        trajectories = self._trajectories()
        sft_data = self._dataset("sft-data", "sft", trajectories)
        sft = self._trained("sft", "sft", config.sft, model=None, data=sft_data)
        steps = [trajectories, sft_data, sft]
        section = {key: value for key, value in config.rl.items() if key != "method"}
        against_model = config.method != "dpo" and "reward" not in section
        if config.method == "dpo" or (against_model and "data" not in config.reward):
            feedback = self._feedback(trajectories, sft)
            preferences = self._dataset("preferences", "preference", feedback)
            steps += [feedback, preferences]
        if config.method == "dpo":
            last = self._trained("dpo", "dpo", section, model=sft, data=preferences)
        else:
            reward = None
            if against_model:
                data = None if "data" in config.reward else preferences
                reward = self._trained("reward", "reward", config.reward, model=None, data=data)
                steps.append(reward)
            prompts = self._dataset("prompts", "prompts", trajectories)
            steps.append(prompts)
            module = "ppo" if config.method == "ppo" else "online"
            if module == "online":
                section["algorithm"] = config.method
            last = self._trained(config.method, module, section, model=sft, data=prompts, reward=reward)
        steps.append(last)
        if config.evaluation.suites:
            steps.append(self._evaluation(sft, last))
        return [*steps, self._model(last)]

    # --- trajectories ---

    def _trajectories(self) -> Step:
        config, drafts = self.config, self.config.drafts
        settings: dict[str, Any] = {
            "constitution": self.rules.digest,
            "logs": [without_password(url) for url in config.logs],
            "as_of": config.logs_as_of,
        }
        needs: tuple[Needs, ...] = ()
        if config.prompts is not None:
            shaping = {key: value for key, value in plain(drafts).items() if key != "concurrency"}
            shaping |= {who: identity(getattr(drafts, who)) for who in ("model", "critic", "reviser")}
            prompts = {"sha256": sha256_of(config.prompts), "column": config.column, "limit": config.limit}
            settings |= {"prompts": prompts, "drafts": shaping, "seed": config.seed}
            if drafts.model is None:
                settings |= self.base
            needs = self.size.drafts()

        def work(folders: Folders) -> dict[str, Any]:
            url = f"sqlite:///{folders.own / _LOG}"
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
            # A row that failed is in the log, too, beside the trajectory of a later attempt.
            count = stats.trajectories - stats.outcomes.get(Outcome.FAILED, 0)
            if not count:
                raise DataError("there is no trajectory to learn from")
            if summary is None:
                return {"trajectories": count, "copied": copied}
            return {
                "trajectories": count,
                "copied": copied,
                "outcomes": dict(summary.outcomes),
                "input_tokens": summary.input_tokens,
                "output_tokens": summary.output_tokens,
                "skipped": len(summary.skipped),
            }

        step = Step(name="trajectories", settings=settings, work=work, needs=needs)
        if config.prompts is not None:
            self.checks.append((step, self._check_drafts))
        return step

    def _check_drafts(self) -> None:
        with checks.in_section("drafts"):
            self._guarded(None, named=unasked)

    def _guarded(
        self, log: str | None, *, named: Callable[[str], str] = str
    ) -> tuple[Any, ConstitutionalChatModel]:
        """Return who drafts, alone and under the constitution; `named` is what a spec is read as."""
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
            budget=Budget(seconds=_ROW_SECONDS),
            **rounds,
        )
        return drafter, guarded

    def _answer(self, url: str) -> bulk.Summary:
        """Answer the prompts that are not answered yet into the log."""
        config, drafts = self.config, self.config.drafts
        drafter, guarded = self._guarded(url)
        assert config.prompts is not None
        assert guarded.plan.log is not None

        async def work(job: bulk.Run) -> None:
            self.progress("prompts", job.done, job.rows)
            async with contextlib.aclosing(job.results(drafts.concurrency)) as results:
                number = job.done
                async for _ in results:
                    number += 1
                    self.progress("prompts", number, job.rows)

        with contextlib.closing(bulk.Rows(str(config.prompts))) as rows, contextlib.closing(guarded.plan.log):
            drafting = {"model": models.name_of(drafter), "max_tokens": drafts.max_tokens}
            job = bulk.Run(guarded, rows, drafting=drafting, column=config.column, limit=config.limit)
            asyncio.run(work(job))
        failures = [row.why for row in job.summary.skipped if isinstance(row, bulk.Failed)]
        _check_failures(failures, job.rows, f"prompts of {config.prompts} were not answered")
        if not job.summary.answered:
            first = job.summary.skipped[0].why if job.summary.skipped else "the file holds none"
            raise DataError(f"no prompt of {config.prompts} was answered: {first}")
        return job.summary

    # --- rows ---

    def _dataset(self, name: str, kind: str, source: Step) -> Step:
        rows = self.config.rows
        held_out = {str(path): sha256_of(path) for path in self.config.evaluation.suites.values()}
        recipe = Recipe(
            kind=kind,  # type: ignore[arg-type]
            test_share=rows.test_share,
            near_duplicates=rows.near_duplicates,
            kept_per_revised=rows.kept_per_revised if kind == "sft" else None,
            per_user=rows.per_user,
            personal_data=rows.personal_data,
            held_out=tuple(held_out),
        )
        settings = {**plain(recipe), "held_out": sorted(held_out.values())}

        def work(folders: Folders) -> dict[str, Any]:
            target = folders.own / "rows"
            if not target.exists():
                dataset.build([f"sqlite:///{folders[source.name] / _LOG}"], target, recipe)
            ledger = dataset.read_manifest(target)["ledger"]
            return {"rows": sum(ledger["kept"].values()), "ledger": ledger}

        return Step(name=name, settings=settings, inputs=(source,), work=work)

    # --- training ---

    def _trained(
        self,
        name: str,
        module: str,
        section: Section,
        *,
        model: Step | None,
        data: Step | None,
        reward: Step | None = None,
    ) -> Step:
        """Return the step of a training stage; `model` None: it starts from the base."""
        given = {"seed": self.config.seed, **section}
        part = "rl" if module not in ("sft", "reward") else module
        ours = ("model", "output", *(("data",) if data is not None else ()))
        for key in ours:
            if key in section:
                raise ConfigError(f"{part}.{key}: is set by the pipeline; leave it out")

        def config_of(base: Path, rows: Path, output: Path, rewards: Path | None) -> Any:
            places = {"model": str(base), "data": str(rows), "output": str(output)}
            if rewards is not None:
                places["reward"] = str(rewards)
            return _section(part, module, {**places, **given}, hidden=ours)

        nowhere = Path("-")
        checked = config_of(nowhere, nowhere, nowhere, None if reward is None else nowhere)
        settings = {
            key: value
            for key, value in plain(checked).items()
            if key not in ("model", "output") and (key != "data" or data is None)
        }
        settings["processes"] = self.processes or list(self.config.launch)
        if reward is not None:
            del settings["reward"]
        elif "reward" in settings:
            settings["reward"] = identity_of_reward(settings["reward"])
        for key in ("data", "value_model"):
            if settings.get(key) is not None:
                settings[key] = identity(settings[key])
        if (watched := settings.get("watch")) is not None:
            named = {key: identity(watched[key]) for key in ("benign", "evasion")}
            settings["watch"] = {**watched, **named, "judge": identity_of_reward(watched["judge"])}
        inputs = tuple(step for step in (model, data, reward) if step is not None)

        def work(folders: Folders) -> dict[str, Any]:
            output = folders.own / CHECKPOINT
            if not output.exists():
                base = (
                    weights.resolve(self.config.model) if model is None else folders[model.name] / CHECKPOINT
                )
                rows = Path(section["data"]) if data is None else folders[data.name] / "rows"
                rewards = None if reward is None else folders[reward.name] / CHECKPOINT
                self._run(module, config_of(base, rows, output, rewards), folders.own / "config.yaml")
            found = Checkpoint.open(output)
            metrics = {} if found.manifest is None else dict(found.manifest.metrics)
            return {"digest": found.digest, "metrics": metrics}

        step = Step(
            name=name,
            settings=settings if model is not None else {**settings, **self.base},
            inputs=inputs,
            work=work,
            needs=self.size.training(module, checked),
        )

        def check() -> None:
            if model is None:
                with checks.in_section("model"):
                    checks.model(self.config.model)
            with checks.in_section(part):
                checks.machine(checked, module, self.processes, is_here=is_here(self.config.launch))
            if data is None:
                with checks.in_section(f"{part}.data"):
                    open_data(checked.data, _stage(module).KINDS)
            trained_on: frozenset[str] = frozenset()  # of a model that is not there yet
            if reward is None and hasattr(checked, "reward"):
                with checks.in_section(f"{part}.reward"):
                    trained_on = checks.reward(checked.reward)
            if getattr(checked, "value_model", None) is not None:
                with checks.in_section(f"{part}.value_model"):
                    checks.model(checked.value_model)
            if getattr(checked, "watch", None) is not None and self.size.prompts:
                with checks.in_section(f"{part}.watch"):
                    checks.watch(checked.watch, trained_on, self.size.prompts * self.config.rows.test_share)

        self.checks.append((step, check))
        return step

    def _run(self, module: str, config: Any, file: Path) -> None:
        """Run a stage here, or as `cai train` under the command that launches processes."""
        if not self.config.launch:
            _stage(module).train(config)
            return
        file.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
        command = [*self.config.launch, "-m", "cai_graph.cli", "train", module, "--config", str(file)]
        try:
            status = subprocess.run(command, check=False).returncode
        except OSError as error:
            raise ConfigError(f"launch: {command[0]!r} cannot be started: {error.strerror}") from error
        if status:
            raise ModelError(f"`{shlex.join(command)}` ended with status {status}; it says why above")

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
            url = f"sqlite:///{folders.own / _LOG}"
            with (
                open_log(f"sqlite:///{folders[trajectories.name] / _LOG}", read_only=True) as source,
                contextlib.closing(open_log(url)) as log,
            ):
                for record in source.read():
                    log.append(record)
                log.flush()
                return self._label(log, folders[sft.name] / CHECKPOINT)

        step = Step(
            name="feedback",
            settings=settings,
            inputs=(trajectories, sft),
            work=work,
            needs=self.size.feedback(),
        )

        def check() -> None:
            with checks.in_section("feedback"):
                self._labelling(_NoRecords(), Path(sft.name), named=unasked)

        self.checks.append((step, check))
        return step

    def _labelling(self, log: Any, checkpoint: Path, *, named: Callable[[str], str] = str) -> Labelling:
        """Return what compares the answers in a log; `named` is what a spec is read as."""
        config, feedback = self.config, self.config.feedback
        sampler = None
        if "samples" in feedback.pairs:
            drawn: dict[str, Any] = {
                "max_tokens": feedback.max_tokens,
                "temperature": feedback.temperature,
                "seed": config.seed,
            }
            if feedback.sampler is None:
                sampler = Sampler(path=checkpoint, **drawn)
            else:
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
        failures: list[str] = []

        async def work() -> None:
            self.progress("comparisons", job.done, job.total)
            async with contextlib.aclosing(job.results(self.config.feedback.concurrency)) as results:
                number = job.done
                async for result in results:
                    number += 1
                    failures.extend([result.failed] if result.failed else [])
                    self.progress("comparisons", number, job.total)

        asyncio.run(work())
        _check_failures(failures, job.total, "trajectories could not be labelled")
        return {"failed": len(failures), "positions": job.positions.summary()}

    # --- what it came to ---

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
            **self.base,
        }

        def work(folders: Folders) -> dict[str, Any]:
            subjects = {
                "base": weights.resolve(self.config.model),
                sft.name: folders[sft.name] / CHECKPOINT,
                last.name: folders[last.name] / CHECKPOINT,
            }
            return self._evaluate(folders.own / "evaluation", subjects)

        step = Step(
            name="evaluation",
            settings=settings,
            inputs=(sft, last),
            work=work,
            needs=self.size.evaluation(),
        )
        self.checks.append((step, self._check_evaluation))
        return step

    def _check_evaluation(self) -> None:
        with checks.in_section("evaluation"):
            for suite in dict.fromkeys(prompt.suite for prompt in self._prompts()):
                self._graders(suite, asking=False)

    def _prompts(self) -> list[Prompt]:
        from trainers.evaluation.suites import read_suite

        wanted = self.config.evaluation
        return [
            prompt
            for suite, path in wanted.suites.items()
            for prompt in read_suite(cast("Suite", suite), path, wanted.limit)
        ]

    def _evaluate(self, folder: Path, subjects: Mapping[str, Path]) -> dict[str, Any]:
        from trainers.evaluation import folder as kept_in
        from trainers.evaluation.generations import CheckpointSubject
        from trainers.evaluation.summary import summarise

        wanted = self.config.evaluation
        kept = kept_in.Evaluation.begin(folder, self._prompts())

        async def work() -> None:
            for name, path in subjects.items():
                subject = CheckpointSubject(
                    path,
                    name=name,
                    max_tokens=wanted.max_tokens,
                    seed=self.config.seed,
                    batch_size=wanted.batch_size,
                )
                await kept.generate(subject, progress=_about(self.progress, f"answers of {name}"))
            for suite in kept.suites():
                for grader in self._graders(suite):
                    who = f"{suite}, by {grader.name}"
                    if not await kept.grade(suite, grader, _about(self.progress, who)):
                        continue
                    rows = [row for found in kept.grades(suite)[grader.name].values() for row in found]
                    failures = [row["error"] for row in rows if kept_in.has_failed(row)]
                    _check_failures(failures, len(rows), f"answers could not be graded ({who})")

        asyncio.run(work())
        return summarise(kept).json()

    def _graders(self, suite: Suite, *, asking: bool = True) -> list[Grader]:
        """Return who grades the answers to a suite; without `asking`, no server what it serves."""
        from trainers.evaluation.folder import AIMS
        from trainers.evaluation.grades import CriticGrader, RewardGrader
        from trainers.evaluation.refusals import refusals_for

        wanted = self.config.evaluation
        named: Callable[[str], str] = str if asking else unasked
        if suite not in AIMS:
            return [] if wanted.refusals is None else [refusals_for(named(wanted.refusals))]
        found: list[Grader] = []
        if wanted.critic is not None:
            found.append(CriticGrader(critic(named(wanted.critic)), self.rules, AIMS[suite]))
        rewards = wanted.reward if asking else map(unasked_reward, wanted.reward)
        return found + [RewardGrader.of(spec) for spec in rewards]

    def _model(self, last: Step) -> Step:
        def work(folders: Folders) -> dict[str, Any]:
            made = folders[last.name] / CHECKPOINT
            for path in made.iterdir():
                if path.is_file():
                    link(path, folders.own / path.name)
            try:
                source = weights.source_of(weights.resolve(self.config.model))
            except ConfigError:
                return {"gguf": False}  # a model of safetensors alone: servers other than ours run it
            weights.to_gguf(made, source, folders.own / local.EXPORTED)
            return {"gguf": True}

        return Step(name="model", settings=self.base, inputs=(last,), work=work)


class _NoRecords:
    """A log in which nothing stands yet."""

    def read(self, **_: Any) -> Iterator[Any]:
        return iter(())


def _stage(module: str) -> Any:
    return importlib.import_module(f"trainers.{module}")


def _section(part: str, module: str, values: Section, *, hidden: Sequence[str]) -> Any:
    """Return the config of a stage, with errors that name the section; `hidden` keys are no user's."""
    settings = [f"{key}={yaml.safe_dump(value)}" for key, value in values.items()]
    further = ("method",) if part == "rl" else ()
    try:
        return read(_stage(module).Config, None, settings, hidden=hidden, further=further)
    except ConfigError as error:
        raise ConfigError(f"{part}: {str(error).removeprefix('--set: ')}") from error


def _check_failures(failures: Sequence[str], total: int, what: str) -> None:
    """Go on without a few rows that failed, and with none of an outage's.

    Raises:
        DataError: more than a tenth failed.
    """
    if len(failures) * 10 > total:
        raise DataError(
            f"{len(failures)} of {total} {what}, the first: {failures[0]}; the same command tries them again"
        )


def _about(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
