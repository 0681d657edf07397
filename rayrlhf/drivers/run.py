"""A PPO run: its roles, its data, its place on disk. The API on which the loop stands, and a user's own loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.algorithms import RunningMoments
from rayrlhf.batch import Batch
from rayrlhf.cluster import Group, Groups, Pending
from rayrlhf.config import Config, broken_rules, load_config
from rayrlhf.data import PromptSampler
from rayrlhf.drivers.base import BaseRun, Opening, opened, started
from rayrlhf.drivers.evaluation import EvaluationLog, evaluate, write_hacking_analysis
from rayrlhf.drivers.experience import UNSCORED, collect, prompt_batch
from rayrlhf.drivers.minibatches import minibatch_schedule
from rayrlhf.drivers.preflight import Prepared, prepare
from rayrlhf.drivers.roles import role_specs
from rayrlhf.drivers.shared_folder import check_shared_folder
from rayrlhf.drivers.state import RunState
from rayrlhf.drivers.transfer import SYNC, connect_weights, transfer_weights
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import SampleWriter, evaluation_line, read_rows
from rayrlhf.monitoring.jsonl import keep_before

__all__ = ["Run", "launch"]


class AdapterOffReference:
    """The reference of a policy with LoRA: the policy itself with its adapters off, at no cost of memory."""

    def __init__(self, policy: Group):
        self._policy = policy

    def submit(self, method: str, batch: Batch) -> Pending:
        return self._policy.submit(method, batch, adapters=False)


class Run(BaseRun):
    """Everything that a loop works with; made by `launch`.

    Attributes:
        config: the resolved configuration.
        policy, critic, reference, reward, rollout: groups of roles; critic and reference may be None.
        prompts: training and held-out prompts.
        state: what a checkpoint keeps of the driver: the step, the KL coefficient, the place in the data.
        progress: what the terminal shows.
        folder: the run's folder.
    """

    timings = {
        "rollout": [("rollout", "generate")],
        "score": [("reward", "score")],
        "reference": [("reference", "token_logprobs")],
        "values": [("critic", "values")],
        "logprobs": [("policy", "token_logprobs")],
        "update": [("policy", "update")],
        "critic_update": [("critic", "update")],
        "sync": SYNC,
    }
    trained = ("policy", "critic")
    config: Config
    state: RunState

    def __init__(self, prepared: Prepared, groups: Groups, opening: Opening):
        config = prepared.config
        self.prepared, self.prompts = prepared, prepared.prompts
        self.policy, self.reward, self.rollout = groups["policy"], groups["reward"], groups["rollout"]
        self.critic = groups.get("critic")
        self.reference: Group | AdapterOffReference | None = groups.get("reference")
        if self.reference is None and config.reference is not None:
            self.reference = AdapterOffReference(self.policy)
        self.sampler = PromptSampler(
            len(self.prompts.train), config.seed, config.data.shuffle, fingerprint=self.prompts.fingerprint
        )
        moments = RunningMoments() if config.reward.normalize else None
        state = RunState(kl_coef=config.ppo.kl_coef, moments=moments)
        super().__init__(opening, groups, state, config.ppo.steps)
        self.evaluations = EvaluationLog(self.folder / "evaluations.jsonl", opening.resume_step)
        self.samples = SampleWriter(self.folder, resume_step=opening.resume_step)
        if opening.resume_step is not None and (self.folder / UNSCORED).exists():
            keep_before(self.folder / UNSCORED, opening.resume_step)

    # -- the loop's verbs ---------------------------------------------------------------------------------------

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
        self.trainers_change()
        trained = {"policy": self.policy}
        if self.critic is not None and "returns" in batch:
            trained["critic"] = self.critic
        self.turns.take(dict.fromkeys(trained, "all"))
        calls = {name: self._start_update(group, batch) for name, group in trained.items()}
        results = {name: call.result()[0] for name, call in calls.items()}
        metrics = dict(results["policy"])
        for name, value in results.get("critic", {}).items():
            metrics[name if name.startswith("value_") else f"critic/{name}"] = value
        return metrics

    def _start_update(self, group: Group, batch: Batch) -> Pending:
        ppo = self.config.ppo
        schedule = minibatch_schedule(
            batch.lengths, ppo.minibatch_samples, ppo.ppo_epochs, group.shards, (self.config.seed, self.state.step)
        )
        return group.broadcast_async("update", batch=batch, schedule=schedule, step=self.state.step + 1)

    def publish_weights(self, verify: bool | None = None) -> dict[str, float]:
        """Give the policy's weights to all rollout engines, under a new version.

        Args:
            verify: compare every engine's weights with the policy's by checksum; by default as
                ``rollout.verify_weights`` says.

        Returns:
            ``sync/bytes``, ``sync/buckets``, ``sync/seconds``, ``sync/gb_per_s``; see `transfer_weights`.

        Raises:
            RunFailed: where a weight differs; it names the tensors.
        """
        self.progress.phase("sync")
        verify = self.config.rollout.verify_weights == "always" if verify is None else verify
        # Engines that share GPUs sleep until now. Their KV cache comes back when they generate, and the policy has gone.
        self.turns.take({"policy": "weights", "rollout": "weights"})
        metrics = transfer_weights(self.policy, self.rollout, self.state.weight_version + 1, verify)
        self.state.weight_version += 1
        return metrics

    def finish_step(self, metrics: Mapping[str, float], batch: Batch | None = None) -> None:
        """Count the step as done: write its metrics and some of its samples, and show it.

        Args:
            metrics: of the step; the timings are added.
            batch: the step's samples, from which the first few are written to samples.jsonl.
        """
        if batch is not None:
            self._write_samples(self.state.step + 1, batch)
        self.count_step(metrics, None if batch is None else batch.num_tokens)

    def save_model(self) -> Path:
        """Write the policy as a Hugging Face folder, with its tokenizer, into ``RUN/model``."""
        return self.write_model(self.prepared.tokenizer)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the present policy on the held-out prompts, and write the result to evaluations.jsonl."""
        self.progress.phase("evaluation")
        result = evaluate(self)
        self.evaluations.add(self.state.step, result)
        self.progress.note(evaluation_line(result))
        self._analyze_hacking(ended=False)
        return result

    # -- inside -------------------------------------------------------------------------------------------------

    def driver_state(self) -> dict[str, Any]:
        """As of the last whole step: a step that fails half-way has taken prompts which it must take again."""
        return {**self.state.to_dict(), "sampler": self.sampler.state_dict()}

    def restore_driver(self, stored: dict[str, Any]) -> None:
        """Go on from what `driver_state` gave."""
        self.sampler.load_state_dict(stored["sampler"])
        self.state = RunState.from_dict(stored)

    def after_step(self, step: int) -> None:
        """An evaluation where one is due; the last one is the loop's."""
        every = self.config.evaluation.every_steps
        if every and step % every == 0 and step != self.total_steps:
            self.evaluate()

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

    def _analyze_hacking(self, ended: bool) -> None:
        if self.config.reward.gold is not None:
            rows = read_rows(self.folder / "metrics.jsonl")
            write_hacking_analysis(rows, self.folder / "reward_hacking.json", ended=ended)

    def close(self, failed: bool) -> None:
        """Close the files, and say in ``reward_hacking.json`` how the score and a gold score went along with each other."""
        self.samples.close()
        self.evaluations.close()
        try:
            self._analyze_hacking(ended=True)
        except RunFailed as error:
            # The files are closed all the same, and where a failure ended the run, that is the one to tell of.
            self.progress.note(str(error), warning=True)
        super().close(failed)


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
        config: a configuration of PPO, or the path of a YAML file with one.
        overrides: ``key=value`` strings, for a file.
        resume: go on from the last whole checkpoint in the run's folder.
        console: where progress is shown; standard output by default.

    Raises:
        InputRefused: before anything was started; or where a role refuses what it was given, or the trained roles' machines don't
            share the run's folder. No run is left behind then.
        RunFailed: where a role can't come up; its own message is in it.
    """
    if isinstance(config, str | os.PathLike):
        loaded = load_config(Path(config), list(overrides))
        if not isinstance(loaded, Config):
            raise InputRefused(f"algorithm: launch runs ppo, and {config} has {loaded.algorithm}")
        config = loaded
    elif violations := broken_rules(config):  # built in Python, past the checks of a file
        raise InputRefused(f"{violation.keys[0]}: {violation.message}" for violation in violations)
    prepared = prepare(config, resume=resume)
    with ExitStack() as stack:
        opening = stack.enter_context(
            opened(config, config.ppo.steps, prepared.prompts.report.lines(), resume=resume, console=console)
        )
        opening.progress.phase("start")
        groups = stack.enter_context(started(config, role_specs(prepared), opening.warn))
        check_shared_folder(Path(config.run_dir), groups, Run.trained)
        run = Run(prepared, groups, opening)
        stack.push(lambda kind, *_: run.close(failed=kind is not None))
        if opening.checkpoint is not None:
            run.restore(opening.checkpoint)
        connect_weights(run.policy, run.rollout, config, run.groups.placement)
        run.publish_weights(verify=True)
        with run.kept():
            yield run
