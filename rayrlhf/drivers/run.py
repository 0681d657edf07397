"""A run: its roles, its data, its place on disk. The API on which the loops stand, ours and the user's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.algorithms import RunningMoments
from rayrlhf.batch import Batch
from rayrlhf.checkpoint import Checkpoint, CheckpointStore
from rayrlhf.cluster import Group, Pending, start_groups
from rayrlhf.config import Config, broken_rules, dump_config, load_config
from rayrlhf.data import PromptSampler
from rayrlhf.drivers.evaluation import EvaluationLog, evaluate
from rayrlhf.drivers.experience import collect, prompt_batch
from rayrlhf.drivers.minibatches import minibatch_schedule
from rayrlhf.drivers.preflight import Prepared, prepare
from rayrlhf.drivers.roles import role_specs
from rayrlhf.drivers.state import RunState
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import (
    MetricWriter,
    Progress,
    SampleWriter,
    close_log,
    evaluation_line,
    read_rows,
    setup_log,
)

__all__ = ["Run", "launch"]

TIMINGS = {
    "rollout": [("rollout", "generate")],
    "score": [("reward", "score")],
    "reference": [("reference", "token_logprobs")],
    "values": [("critic", "values")],
    "logprobs": [("policy", "token_logprobs")],
    "update": [("policy", "update")],
    "critic_update": [("critic", "update")],
    "sync": [("policy", "publish_weights"), ("rollout", "receive_weights"), ("policy", "release_weights")],
}
"""Which work of which roles each timing adds up."""


class AdapterOffReference:
    """The reference of a policy with LoRA: the policy itself with its adapters off, at no cost of memory."""

    def __init__(self, policy: Group):
        self._policy = policy

    def submit(self, method: str, batch: Batch) -> Pending:
        return self._policy.submit(method, batch, adapters=False)


class Run:
    """Everything that a loop works with; made by `launch`.

    Attributes:
        config: the resolved configuration.
        policy, critic, reference, reward, rollout: groups of roles; critic and reference may be None.
        prompts: training and held-out prompts.
        state: what a checkpoint keeps of the driver: the step, the KL coefficient, the place in the data.
        progress: what the terminal shows.
        folder: the run's folder.
    """

    def __init__(self, prepared: Prepared, groups: Mapping[str, Group], progress: Progress, resume_step: int | None):
        self.prepared, self.config, self.progress = prepared, prepared.config, progress
        self.folder = Path(self.config.run_dir)
        self.groups = groups
        self.policy, self.reward, self.rollout = groups["policy"], groups["reward"], groups["rollout"]
        self.critic = groups.get("critic")
        self.reference: Group | AdapterOffReference | None = groups.get("reference")
        if self.reference is None and self.config.reference is not None:
            self.reference = AdapterOffReference(self.policy)
        self.prompts = prepared.prompts
        data = self.config.data
        self.sampler = PromptSampler(
            len(self.prompts.train), self.config.seed, data.shuffle, fingerprint=self.prompts.fingerprint
        )
        moments = RunningMoments() if self.config.reward.normalize else None
        self.state = RunState(kl_coef=self.config.ppo.kl_coef, moments=moments)
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", self.config.checkpoint.keep)
        self.evaluations = EvaluationLog(self.folder / "evaluations.jsonl", resume_step)
        self._trainers_hold_whole_step = True
        self._saved_step = -1
        self._snapshot = self._driver_state()
        self._step_started = time.monotonic()
        self.metrics = MetricWriter(
            self.folder,
            tensorboard=self.config.monitoring.tensorboard,
            wandb_project=self.config.monitoring.wandb_project,
            config_dict=self.config.model_dump(mode="json"),
            resume_step=resume_step,
        )
        self.samples = SampleWriter(self.folder, resume_step=resume_step)

    # -- the loop's verbs ---------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, counted from 1; after each, a checkpoint or an evaluation where one is due."""
        while self.state.step < self.config.ppo.steps:
            self._step_started = time.monotonic()
            self._busy()
            step = self.state.step + 1
            yield step
            if self.state.step != step:
                raise RunFailed(f"the loop didn't finish step {step}: call run.finish_step(metrics) in each round")
            self._after_step(step)

    def next_prompts(self) -> Batch:
        """The next ``ppo.prompts_per_step`` prompts, each ``rollout.samples_per_prompt`` times, with their seeds."""
        chosen = [self.prompts.train[i] for i in self.sampler.next(self.config.ppo.prompts_per_step)]
        return prompt_batch(chosen, self.config.rollout.samples_per_prompt, (self.config.seed, self.state.step))

    def collect(self, prompts: Batch) -> Batch:
        """Generate and score; see `rayrlhf.drivers.experience.collect`."""
        return collect(self, prompts)

    def update(self, batch: Batch) -> dict[str, float]:
        """Train the policy, and the critic at the same time if there is one.

        Args:
            batch: with the columns tokens, response_mask, rollout_logprobs, old_logprobs, advantages (and values, returns
                for the critic, reference_logprobs for a KL term in the loss).

        Returns:
            The policy's metrics under their names, the critic's own ``grad_norm`` and ``lr`` under ``critic/``.
        """
        self.progress.phase("update")
        self._trainers_hold_whole_step = False
        calls = {"policy": self._start_update(self.policy, batch)}
        if self.critic is not None and "returns" in batch:
            calls["critic"] = self._start_update(self.critic, batch)
        results = {name: call.result()[0] for name, call in calls.items()}
        metrics = dict(results["policy"])
        for name, value in results.get("critic", {}).items():
            metrics[name if name.startswith("value_") else f"critic/{name}"] = value
        return metrics

    def _start_update(self, group: Group, batch: Batch) -> Pending:
        ppo = self.config.ppo
        schedule = minibatch_schedule(
            batch.lengths, ppo.minibatch_samples, ppo.ppo_epochs, group.size, (self.config.seed, self.state.step)
        )
        return group.broadcast_async("update", batch=batch, schedule=schedule, step=self.state.step + 1)

    def publish_weights(self, verify: bool | None = None) -> dict[str, float]:
        """Give the policy's weights to all rollout engines, under a new version.

        Args:
            verify: compare every engine's weights with the policy's by checksum; by default as
                ``rollout.verify_weights`` says.

        Returns:
            ``sync/bytes``, ``sync/buckets``.

        Raises:
            RunFailed: where a weight differs; it names the tensors.
        """
        self.progress.phase("sync")
        version = self.state.weight_version + 1
        verify = self.config.rollout.verify_weights == "always" if verify is None else verify
        manifest = self.policy.broadcast("publish_weights", version=version, checksums=verify)[0]
        try:
            self.rollout.broadcast("receive_weights", manifest=manifest, verify=verify)
        finally:
            self.policy.broadcast("release_weights", manifest=manifest)
        self.state.weight_version = version
        return {"sync/bytes": float(manifest.nbytes), "sync/buckets": float(len(manifest.buckets))}

    def finish_step(self, metrics: Mapping[str, float], batch: Batch | None = None) -> None:
        """Count the step as done: write its metrics and some of its samples, and show it.

        Args:
            metrics: of the step; the timings are added.
            batch: the step's samples, from which the first few are written to samples.jsonl.
        """
        step = self.state.step + 1
        total = time.monotonic() - self._step_started
        row = {**metrics, **self._timings(), "timing/total_s": total}
        if batch is not None:
            row["tokens_per_s"] = batch.num_tokens / total
            self._write_samples(step, batch)
        self.metrics.log(step, row)
        self.progress.step(step, row)
        self.state.step = step
        self._trainers_hold_whole_step = True
        self._snapshot = self._driver_state()

    def save_checkpoint(self) -> None:
        """Save all that the run needs to go on from here.

        Raises:
            RunFailed: where it can't be written; earlier checkpoints stay.
        """
        step = self.state.step
        self.progress.phase("checkpoint")

        def write_roles(folder: Path) -> None:
            where = folder.absolute()
            calls = [g.broadcast_async("save", folder=str(where / name)) for name, g in self._trained().items()]
            for call in calls:
                call.result()

        try:
            saved = self.checkpoints.save(step, self._snapshot, write_roles)
        except (OSError, RunFailed) as error:
            raise RunFailed(
                f"the checkpoint of step {step} could not be written: {error}. "
                "Earlier checkpoints are untouched; make room, then go on with --resume"
            ) from error
        self._saved_step = step
        self.progress.note(f"checkpoint of step {step} saved in {saved.folder}")

    def save_model(self) -> Path:
        """Write the policy as a Hugging Face folder, with its tokenizer, into ``RUN/model``."""
        folder = self.folder / "model"
        try:
            self.policy.broadcast("save_model", folder=str(folder.absolute()))
            self.prepared.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise RunFailed(f"the model could not be written into {folder}: {error}") from error
        return folder

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the present policy on the held-out prompts, and write the result to evaluations.jsonl."""
        self.progress.phase("evaluation")
        result = evaluate(self)
        self.evaluations.add(self.state.step, result)
        self.progress.note(evaluation_line(result))
        return result

    # -- inside -------------------------------------------------------------------------------------------------

    def _driver_state(self) -> dict[str, Any]:
        """As of the last whole step: a step that fails half-way has taken prompts which it must take again."""
        return {**self.state.to_dict(), "sampler": self.sampler.state_dict()}

    def _trained(self) -> dict[str, Group]:
        return {name: self.groups[name] for name in ("policy", "critic") if name in self.groups}

    def _timings(self) -> dict[str, float]:
        """Seconds that roles were at work; with Ray some of them at the same time."""
        busy = self._busy()
        shown = {}
        for name, work in TIMINGS.items():
            spent = [busy[role].get(method, 0.0) for role, method in work if role in busy]
            if spent:
                shown[f"timing/{name}_s"] = sum(spent)
        return shown

    def _busy(self) -> dict[str, dict[str, float]]:
        """Seconds at work since this was last asked, by role and method."""
        return {name: group.take_busy() for name, group in self.groups.items()}

    def _after_step(self, step: int) -> None:
        last = step == self.config.ppo.steps
        every = self.config.evaluation.every_steps
        if every and step % every == 0 and not last:
            self.evaluate()
        every = self.config.checkpoint.every_steps
        if last or (every and step % every == 0):
            self.save_checkpoint()

    def _write_samples(self, step: int, batch: Batch) -> None:
        count = min(self.config.monitoring.samples_per_step, len(batch))
        if not count:
            return
        from rayrlhf.drivers.advantages import response_lengths, sequence_kl

        first = batch.select(range(count))
        kl = sequence_kl(first).tolist() if "reference_logprobs" in first else [None] * count
        decode = self.prepared.tokenizer.decode
        for i, (start, end) in enumerate(first.spans()):
            begin = start + int(first["prompt_length"][i])
            self.samples.write(
                step,
                prompt=first["prompt_text"][i],
                response=decode(first["tokens"][begin:end].tolist(), skip_special_tokens=True),
                score=float(first["score"][i]),
                kl=kl[i],
                response_tokens=int(response_lengths(first)[i]),
                finish_reason=first["finish_reason"][i],
                weight_version=int(first["weight_version"][i]),
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        calls = [
            group.broadcast_async("load", folder=str((checkpoint.folder / name).absolute()))
            for name, group in self._trained().items()
        ]
        for call in calls:
            call.result()
        self.sampler.load_state_dict(checkpoint.state["sampler"])
        self.state = RunState.from_dict(checkpoint.state)
        self._saved_step = self.state.step
        self._snapshot = self._driver_state()
        self.progress.note(f"going on after step {self.state.step}, from {checkpoint.folder}")

    def _keep_what_was_trained(self) -> None:
        """After a failure outside an update the trainers hold a whole step: save it."""
        if not self._trainers_hold_whole_step or self.state.step in (0, self._saved_step):
            return
        try:
            self.save_checkpoint()
        except RunFailed as error:
            self.progress.note(f"what was trained since the last checkpoint could not be saved: {error}", warning=True)

    def _close(self, failed: bool) -> None:
        self.metrics.close(failed=failed)
        self.samples.close()


def _progress(config: Config, resume_step: int | None, console: Console | None) -> Progress:
    folder = Path(config.run_dir)
    history = [r for r in read_rows(folder / "metrics.jsonl") if r["step"] < resume_step] if resume_step else []
    return Progress(
        config.monitoring.progress,
        config.ppo.steps,
        run_dir=folder,
        console=console,
        history=history,
        debugging=config.cluster.executor == "inline",
    )


def _start(prepared: Prepared, stack: ExitStack) -> Mapping[str, Group]:
    """All roles, on Ray or in this process, until ``stack`` is left."""
    settings = prepared.config.cluster
    if settings.executor == "ray":
        from rayrlhf.cluster.session import ray_session

        stack.enter_context(ray_session(settings))
    return stack.enter_context(start_groups(role_specs(prepared), executor=settings.executor, settings=settings))


@contextmanager
def launch(
    config: Config | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Iterator[Run]:
    """Check everything, start all roles, and give their weights to the rollout engines.

    Args:
        config: a configuration, or the path of a YAML file.
        overrides: ``key=value`` strings, for a file.
        resume: go on from the last whole checkpoint in the run's folder.
        console: where progress is shown; standard output by default.

    Raises:
        InputRefused: before anything was started.
        RunFailed: where a role can't come up; its own message is in it.
    """
    if not isinstance(config, Config):
        config = load_config(Path(config), list(overrides))
    elif violations := broken_rules(config):  # built in Python, past the checks of a file
        raise InputRefused(f"{violation.keys[0]}: {violation.message}" for violation in violations)
    prepared = prepare(config, resume=resume)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, folder / "config.yaml")
    setup_log(folder)
    checkpoint: Checkpoint | None = None
    passed_over: list[str] = []
    if resume:
        checkpoint, passed_over = CheckpointStore(folder / "checkpoints", config.checkpoint.keep).latest()
    # Without a checkpoint, a resumed run begins again: what it had written belongs to steps that are done anew.
    resume_step = (1 if checkpoint is None else checkpoint.step + 1) if resume else None
    with ExitStack() as stack:
        stack.callback(close_log)
        progress = stack.enter_context(_progress(config, resume_step, console))
        for line in (*prepared.prompts.report.lines(), *passed_over):
            progress.note(line)
        progress.phase("start")
        run = Run(prepared, _start(prepared, stack), progress, resume_step)
        stack.push(lambda kind, *_: run._close(failed=kind is not None))
        if checkpoint is not None:
            run._restore(checkpoint)
        run.publish_weights(verify=True)
        try:
            yield run
        except BaseException:
            run._keep_what_was_trained()
            raise
