"""The steps of a pipeline: what each depends on, and what it does."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from cai_graph import bulk, chain, local, models
from cai_graph import constitution as constitutions
from cai_graph.blocks import sha256_of
from cai_graph.calls import Budget
from cai_graph.chat import ConstitutionalChatModel
from cai_graph.critic import Critic, critic_for
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.log import open_log, without_password
from cai_graph.log.transfer import export as export_log
from cai_graph.log.transfer import import_
from cai_graph.trained import PREFIX
from trainers import dataset, weights
from trainers.checkpoint import Checkpoint
from trainers.config import plain, read
from trainers.distill.config import Config, Section
from trainers.feedback import Config as Labels
from trainers.feedback import Labelling
from trainers.judge import Judge
from trainers.pipeline import DONE, Folders, Needs, Pipeline, Step, Tell
from trainers.recipe import Recipe
from trainers.sampler import Sampler
from trainers.sizes import Size

__all__ = ["pipeline", "train"]

Progress = Callable[[str, int, int], None]
"""Told what is counted, how many are done, and of how many."""

CHECKPOINT = "checkpoint"
_LOG = "log.db"
_ROW_SECONDS = 3600.0
_API_RETRIES = 8


def pipeline(config: Config, progress: Progress = lambda what, done, total: None) -> Pipeline:
    """Return the steps of a config; whatever can be checked without work is checked here.

    Raises:
        ConfigError: a section has an unknown key or a value that cannot work, or a file is missing.
        ConstitutionError: the constitution cannot be read.
        DataError: the prompts cannot be read.
    """
    return Pipeline(config.output, _Plan(config, progress).steps())


def train(
    config: Config, tell: Tell, progress: Progress = lambda what, done, total: None
) -> tuple[Checkpoint, Path]:
    """Do what is not done yet; return the trained model, which is `config.output`, and the report.

    Raises:
        StepFailed: a step ended with an error; names it. The next run goes on from there.
        CaiError: what `pipeline` raises.
    """
    from trainers.report import report

    steps = pipeline(config, progress)
    done = steps.run(tell)
    _publish(done["model"].path, config.output)
    page = report(config.output, config, steps, done)
    return Checkpoint.open(config.output), page


class _Plan:
    """The steps of one config, each with its work."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.rules = constitutions.load(config.constitution)
        self.base = {"model": _identity(config.model)}
        missing = [str(path) for path in config.evaluation.suites.values() if not path.exists()]
        if missing:
            raise ConfigError(f"evaluation: {', '.join(missing)} is not there")
        self.size = Size.of(config)

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
            shaping["critic"] = _identity(drafts.critic)
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
            if not stats.trajectories:
                raise DataError("there is no trajectory to learn from")
            if summary is None:
                return {"trajectories": stats.trajectories, "copied": copied}
            return {
                "trajectories": stats.trajectories,
                "copied": copied,
                "outcomes": dict(summary.outcomes),
                "input_tokens": summary.input_tokens,
                "output_tokens": summary.output_tokens,
                "skipped": len(summary.skipped),
            }

        return Step(name="trajectories", settings=settings, work=work, needs=needs)

    def _answer(self, url: str) -> bulk.Summary:
        """Answer the prompts that are not answered yet into the log."""
        config, drafts = self.config, self.config.drafts
        shaped = {"temperature": drafts.temperature, "seed": config.seed}
        who = drafts.model or config.model
        drafter = _chat(who, max_tokens=drafts.max_tokens, **shaped)
        reviser = _chat(drafts.reviser or who, max_tokens=2 * drafts.max_tokens, **shaped)
        rounds: dict[str, Any] = {} if drafts.max_rounds is None else {"max_rounds": drafts.max_rounds}
        guarded: ConstitutionalChatModel = chain.constitutional(
            drafter,
            constitution=self.rules,
            critic=drafts.critic,
            reviser=reviser,
            log=url,
            strategy=drafts.strategy,
            seed=config.seed,
            on_log_error="raise",
            budget=Budget(seconds=_ROW_SECONDS),
            **rounds,
        )
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
        for key in ("model", "output", *(("data",) if data is not None else ())):
            if key in section:
                raise ConfigError(f"{part}.{key}: is set by the pipeline; leave it out")

        def config_of(base: Path, rows: Path, output: Path, rewards: Path | None) -> Any:
            places = {"model": str(base), "data": str(rows), "output": str(output)}
            if rewards is not None:
                places["reward"] = str(rewards)
            return _section(part, module, {**places, **given})

        nowhere = Path("-")
        checked = config_of(nowhere, nowhere, nowhere, None if reward is None else nowhere)
        settings = {
            key: value
            for key, value in plain(checked).items()
            if key not in ("model", "output") and (key != "data" or data is None)
        }
        if reward is not None:
            del settings["reward"]
        if data is None:
            settings["data"] = _identity(str(section["data"]))
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

        return Step(
            name=name,
            settings=settings if model is not None else {**settings, **self.base},
            inputs=inputs,
            work=work,
            needs=self.size.training(module, checked),
        )

    def _run(self, module: str, config: Any, file: Path) -> None:
        """Run a stage here, or as `cai train` under the command that launches processes."""
        if not self.config.launch:
            _stage(module).train(config)
            return
        file.write_text(json.dumps(plain(config), indent=2) + "\n", encoding="utf-8")  # JSON is YAML
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
            "critic": _identity(feedback.critic),
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

        return Step(
            name="feedback",
            settings=settings,
            inputs=(trajectories, sft),
            work=work,
            needs=self.size.feedback(),
        )

    def _label(self, log: Any, checkpoint: Path) -> dict[str, Any]:
        config, feedback = self.config, self.config.feedback
        sampler = None
        if "samples" in feedback.pairs:
            sampler = _chat(
                feedback.sampler or str(checkpoint),
                max_tokens=feedback.max_tokens,
                temperature=feedback.temperature,
                seed=config.seed,
            )
        spec = feedback.judge or feedback.critic
        assert spec is not None
        job = Labelling(
            log,
            Judge(_chat(spec)) if feedback.judge else _critic(spec),
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
        failures: list[str] = []

        async def work() -> None:
            self.progress("comparisons", job.done, job.total)
            async with contextlib.aclosing(job.results(feedback.concurrency)) as results:
                number = job.done
                async for result in results:
                    number += 1
                    failures.extend([result.failed] if result.failed else [])
                    self.progress("comparisons", number, job.total)

        asyncio.run(work())
        if failures and len(failures) * 10 > job.total:
            raise DataError(
                f"{len(failures)} of {job.total} trajectories could not be labelled, the first: "
                f"{failures[0]}; the same command tries them again"
            )
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
            "critic": _identity(wanted.critic),
            "reward": [_identity(spec) for spec in wanted.reward],
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

        return Step(
            name="evaluation",
            settings=settings,
            inputs=(sft, last),
            work=work,
            needs=self.size.evaluation(),
        )

    def _evaluate(self, folder: Path, subjects: Mapping[str, Path]) -> dict[str, Any]:
        from trainers.evaluation import folder as kept_in
        from trainers.evaluation.generations import CheckpointSubject
        from trainers.evaluation.grades import CriticGrader, Grader, RewardGrader
        from trainers.evaluation.refusals import refusals_for
        from trainers.evaluation.suites import Suite, read_suite
        from trainers.evaluation.summary import summarise

        wanted = self.config.evaluation
        prompts = [
            prompt
            for suite, path in wanted.suites.items()
            for prompt in read_suite(cast(Suite, suite), path, wanted.limit)
        ]
        kept = kept_in.Evaluation.begin(folder, prompts)

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
                graders: list[Grader] = []
                if suite in kept_in.AIMS:
                    if wanted.critic is not None:
                        graders.append(CriticGrader(_critic(wanted.critic), self.rules, kept_in.AIMS[suite]))
                    graders += [RewardGrader.of(spec) for spec in wanted.reward]
                elif wanted.refusals is not None:
                    graders.append(refusals_for(wanted.refusals))
                for grader in graders:
                    await kept.grade(suite, grader, _about(self.progress, f"{suite}, by {grader.name}"))

        asyncio.run(work())
        return summarise(kept).json()

    def _model(self, last: Step) -> Step:
        def work(folders: Folders) -> dict[str, Any]:
            made = folders[last.name] / CHECKPOINT
            for path in made.iterdir():
                if path.is_file():
                    _link(path, folders.own / path.name)
            try:
                source = weights.source_of(weights.resolve(self.config.model))
            except ConfigError:
                return {"gguf": False}  # a model of safetensors alone: servers other than ours run it
            weights.to_gguf(made, source, folders.own / local.EXPORTED)
            return {"gguf": True}

        return Step(name="model", settings=self.base, inputs=(last,), work=work)


def _stage(module: str) -> Any:
    return importlib.import_module(f"trainers.{module}")


def _section(part: str, module: str, values: Section) -> Any:
    """Return the config of a stage, with errors that name the section."""
    try:
        return read(_stage(module).Config, None, [f"{key}={json.dumps(v)}" for key, v in values.items()])
    except ConfigError as error:
        raise ConfigError(f"{part}: {str(error).removeprefix('--set: ')}") from error


def _about(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _chat(spec: str, **settings: Any) -> Any:
    """Return the chat model of a spec; a folder of weights is sampled here."""
    folder = Path(spec.removeprefix("local:")).expanduser()
    if folder.is_dir() and not spec.startswith("local:"):
        return Sampler(path=folder, **settings)
    if spec.partition(":")[0] != "local":
        settings.pop("seed", None)
        settings["max_retries"] = _API_RETRIES
    return models.load(spec, **settings)


def _critic(spec: str) -> Critic:
    """Return who judges answers one by one."""
    return critic_for(spec if spec.startswith(PREFIX) else _chat(spec))


def _identity(spec: str | None) -> str:
    """Return what names the bytes behind a model, a critic or a file: a digest where they are here."""
    if spec is None:
        return ""
    kind, _, name = spec.partition(":")
    for model in local.CATALOGUE:
        if kind == "local" and (name or local.DEFAULT_MODEL) == model.name:
            return model.sha256
    path = Path(name if kind in ("local", "trained") else spec).expanduser()
    if path.is_file():
        return sha256_of(path)
    if (path / "manifest.json").exists() and any(path.glob("*.safetensors")):
        return Checkpoint.open(path).digest
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file())
        return json.dumps([[str(one.relative_to(path)), sha256_of(one)] for one in files])
    return spec


def _link(source: Path, target: Path) -> None:
    """Put a file in a second place, at no cost where the file system can; it appears whole."""
    work = target.with_name(f".{target.name}.new")
    work.unlink(missing_ok=True)
    try:
        os.link(source, work)
    except OSError:
        shutil.copyfile(source, work)
    os.replace(work, target)


def _publish(made: Path, output: Path) -> None:
    """Show the finished model in the output folder itself."""
    for path in sorted(made.iterdir()):
        if path.is_file() and path.name != DONE:
            _link(path, output / path.name)
