"""Real jobs on a cluster of three nodes on this machine, submitted as a user does it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from rayrlhf.drivers.submit_command import run_submit
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(600)
TOKEN = "the-token-of-this-test"
REWARDS = """
import os, time, torch

def small(prompts, responses):
    if path := os.environ.get("THREADS_FILE"):
        with open(path, "w") as file:
            file.write(f"{os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}")
    return [sum(int(word[1:]) < 20 for word in response.split()) / 8 for response in responses]

def slow(prompts, responses):
    time.sleep(1)
    return small(prompts, responses)
"""
CONFIG = """
run_dir: runs/first
seed: 3
policy: {path: model, dtype: float32, ranks: 2, zero_stage: 3, tokens_per_micro_batch: 128, optimizer: {lr: 0.003}}
critic: null
reference: null
reward: {sources: [{function: "my_rewards:small"}]}
data: {prompts: prompts.jsonl, max_prompt_tokens: 8}
rollout: {engine: transformers, engines: 2, max_response_tokens: 8, samples_per_prompt: 2, chunk_samples: 4}
ppo: {steps: 3, prompts_per_step: 8, minibatch_samples: 8, advantage_estimator: rloo, kl_coef: 0.0}
evaluation: {prompts: 0}
monitoring: {tensorboard: false}
cluster:
  nodes: [{count: 3, gpus: 2}]
  placement: disaggregated
  start_timeout_s: 400
  call_timeout_s: 120
"""
SOON = 60
"""Seconds until it is said what a job waits for: three on idle cores, and fifteen minutes before it is given up."""
SMALL = ["policy.ranks=1", "policy.zero_stage=1", "rollout.engines=1"]
"""Fewer processes to wait for, on two GPUs."""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**kept, "PYTHONPATH": str(ROOT), **ours, **more}


@pytest.fixture(scope="module")
def cluster():
    """Three nodes with one GPU each or two, that let in who has the token; gives the dashboard's address."""
    line = [sys.executable, str(ROOT / "launch" / "fake_cluster.py"), "1", "2", "2", "--port", "0"]
    secret = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=secret
    )
    watchdog = threading.Timer(180, process.kill)
    watchdog.start()
    addresses = json.loads(process.stdout.readline())
    watchdog.cancel()
    yield addresses["dashboard"]
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A user's folder: configuration, model, prompts and a reward of their own. Nothing of it is on the import path here."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_model(folder / "model")
    rows = [{"prompt": " ".join(f"w{(7 * i + k) % 61}" for k in range(2 + i % 4))} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "ppo.yaml").write_text(CONFIG.replace("count: 3, gpus: 2", "count: 1, gpus: 1}, {count: 2, gpus: 2"))
    return folder


def start(project: Path, cluster: str, *arguments: str, **variables: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "rayrlhf.cli", "submit", *arguments, "--address", cluster]
    env = environment(**{"RAY_AUTH_TOKEN": TOKEN, **variables})
    return subprocess.Popen(line, cwd=project, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def submit(project: Path, cluster: str, *arguments: str, **variables: str) -> tuple[int, str]:
    process = start(project, cluster, *arguments, **variables)
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    return process.returncode, output


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """What it prints, up to a line with this pattern."""
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(pattern, line):
            return "".join(said)
    raise AssertionError(f"{pattern!r} never came in:\n{''.join(said)}")


def since_start(line: str) -> int:
    """The seconds of a line of progress."""
    hours, minutes, seconds = re.search(r"\[(\d+):(\d\d):(\d\d)\]", line).groups()
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def test_a_run_on_three_nodes_to_its_end(cluster, project, tmp_path):
    threads = ["--env", "OMP_NUM_THREADS=3", "--env", f"THREADS_FILE={tmp_path / 'threads'}"]
    # The policy and two engines, each on a node of its own.
    few = ["ppo.steps=2", "policy.ranks=1", "rollout.engines=2"]
    code, output = submit(project, cluster, "ppo.yaml", *few, *threads)
    assert code == 0, output
    assert re.search(r"run_dir runs/first is .*/runs/first on the cluster", output)
    assert "step 2/2  score" in output and "done: 2 of 2 steps" in output
    assert "\x1e" not in output, "the events are for the display"
    folder = project / "runs" / "first"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert (folder / "model" / "model.safetensors").exists()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["cluster"]["address"] == "auto" and written["policy"]["path"] == "model"
    assert (tmp_path / "threads").read_text() == "3 3", "what the job was given, not what Ray puts into its processes"
    # For more machines than there are: told as soon as the job knows, and refused when none has joined.
    change = ["run_dir=runs/larger", "cluster.nodes=[{count: 4, gpus: 2}]", "cluster.placement_timeout_s=4"]
    code, output = submit(project, cluster, "ppo.yaml", *change)
    assert code == 2 and "refused its input" in output, output
    lacks = "cluster.nodes names 4 machines of 2 GPUs, the Ray cluster has 2 machines of 2 GPUs and 1 machine of 1 GPU"
    told = re.search(rf".*warning: waiting up to \d+ s for machines to join the Ray cluster: {lacks}", output)
    assert told is not None and since_start(told.group()) <= SOON, output
    assert output.count(lacks) == 2 and "no more machines joined within 4 s" in output


def test_refused_before_anything_is_sent(cluster, project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for change, words in (
        ("cluster.executor=inline", "cluster.executor"),
        ("ppo.minibatch_samples=7", "minibatch_samples"),
        ("rollout.engines=4", "GPU"),
        ("data.prompts=nothing.jsonl", "data.prompts"),
    ):
        with pytest.raises(InputRefused, match=words):
            submit_here(cluster, change)
    with pytest.raises(InputRefused, match="NOT_SET_HERE is not set here"):
        submit_here(cluster, env=["NOT_SET_HERE"])
    code, output = submit(project, cluster, "ppo.yaml", "run_dir=runs/never", "rollout.engines=4")
    assert code == 2 and "GPU" in output and "accepted" not in output, output
    assert not (project / "runs" / "never").exists()


def test_nobody_is_let_in_without_the_token(cluster, project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(project))
    with pytest.raises(InputRefused, match="there is none here"):
        submit_here(cluster)
    with pytest.raises(InputRefused, match="no dashboard answers"):
        submit_here("http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(InputRefused, match="doesn't take the token"):
        submit_here(cluster)
    code, output = submit(project, cluster, "--follow", "no-such-job")
    assert code == 2 and "there is no job no-such-job" in output
    assert not (project / "runs" / "never").exists()


def submit_here(cluster: str, *changes: str, env: list[str] | None = None) -> None:
    """The command's work in this process: what is refused needs no other."""
    given = {"address": cluster, "resume": False, "on_interrupt": "ask", "wait": True, "env": env or [], "follow": None}
    run_submit(Path("ppo.yaml"), ["run_dir=runs/never", *changes], **given)


def test_ctrl_c_leaves_or_stops_and_who_wants_the_same_gpus_waits(cluster, project):
    """A long run has two GPUs of five, and is left; another one wants four, and waits; both are stopped."""
    change = [*SMALL, "run_dir=runs/long", "ppo.steps=5000", "reward.sources.0.function=my_rewards:slow"]
    long = start(project, cluster, "ppo.yaml", *change, "--on-interrupt", "leave")
    try:
        before = read_until(long, r"step 2/5000")
        job = re.search(r"job (long-\w+) is accepted", before).group(1)
        long.send_signal(signal.SIGINT)
        rest, _ = long.communicate(timeout=60)
    finally:
        long.kill()
    assert long.returncode == 1 and f"--follow {job}" in rest and "which goes on" in rest

    second = start(project, cluster, "ppo.yaml", "run_dir=runs/second", "--on-interrupt", "stop")
    again = start(project, cluster, "--follow", job, "--on-interrupt", "stop")
    try:
        said = read_until(second, r"warning: waiting up to \d+ s for GPUs: .*GPUs free.*held: .* by job")
        starts, waits = re.search(r".*phase: start", said).group(), said.splitlines()[-1]
        assert since_start(waits) - since_start(starts) <= SOON
        second.send_signal(signal.SIGINT)
        # The first one's log is there from the beginning, and the job went on.
        followed = read_until(again, r"step 6/5000")
        assert "step 1/5000" in followed
        again.send_signal(signal.SIGINT)
        rest, _ = again.communicate(timeout=150)
        assert again.returncode == 1 and "was stopped" in rest, rest
        # It was stopped as Ctrl-C would have stopped it here: it ended by itself, and wrote its report.
        assert re.search(r"interrupted: \d+ of 5000 steps", rest) and "go on with --resume" in rest, rest
        assert (project / "runs" / "long" / "report.html").exists()
        rest, _ = second.communicate(timeout=150)
        assert second.returncode == 1 and "was stopped" in rest, rest
    finally:
        second.kill()
        again.kill()
