"""launch/slurm.sbatch: what it asks Slurm for, and the commands that it runs, with stand-ins for Slurm's and Ray's programs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"

STUBS = {
    # Runs what it is given on "another node" at once, as Slurm would.
    "srun": """
        echo "srun $*" >> "$LOG"
        if [ "$SRUN_CPUS_PER_TASK" = 48 ]; then echo "all cores" >> "$LOG"; fi
        while [[ "$1" == --* ]]; do shift; done
        exec "$@" """,
    "scontrol": """
        echo "scontrol $*" >> "$LOG"
        if [ "$1" = show ]; then printf 'node-a\\nnode-b\\nnode-c\\n'; fi""",
    # As on a stock Debian or Ubuntu, where the name means 127.0.1.1 (`hostname --ip-address`).
    "hostname": """
        if [ "$1" = -I ]; then echo "${ADDRESSES-fe80::1 127.0.1.1 10.0.0.7 192.168.0.7}"; else echo 127.0.1.1; fi""",
    # The pauses of the script are those of the stand-ins.
    "sleep": "exec /bin/sleep 0.1",
    # `ray start --block` lives until it is ended, and says so; `ray list nodes` knows a step's nodes once that is up, which
    # "token ok" says: it hears signals by then. SIGNAL comes to the script while it waits for the nodes.
    "ray": """
        echo "ray $*" >> "$LOG"
        if [ "$1" = list ]; then
            if [ -n "$RAY_DIES" ]; then exit 1; fi
            case $(grep -c "token ok" "$LOG") in
                0) echo '[]' ;;
                1) echo '[{}]' ;;
                2) echo '[{}, {}, {}]' ;;
            esac
            exit 0
        fi
        trap 'echo "ended: ray $*" >> "$LOG"; exit 0' TERM
        if [ -n "$SIGNAL" ]; then kill -s "$SIGNAL" "$PPID"; fi
        [ "$RAY_AUTH_MODE" = token ] && [ "${#RAY_AUTH_TOKEN}" = 64 ] && echo "token ok" >> "$LOG"
        if [ -n "$RAY_DIES" ]; then exit 3; fi
        while true; do sleep 0.1; done""",
    "rayrlhf": """
        trap 'echo "interrupted" >> "$LOG"; exit 1' INT
        echo "not through a proxy: $no_proxy" >> "$LOG"
        echo "rayrlhf $*" >> "$LOG"
        for _ in $(seq "${SUBMIT_SECONDS:-1}"); do sleep 0.1; done
        exit "${SUBMIT_CODE:-0}" """,
}


@pytest.fixture
def stage(tmp_path):
    """A folder with stand-ins, and the environment in which Slurm would run the script."""
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name, body in STUBS.items():
        (programs / name).write_text("#!/bin/bash\n" + body + "\n")
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(shutil.which("python3") or "/usr/bin/python3")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "ENVIRONMENT": str(tmp_path / "env"),
        "LOG": str(tmp_path / "log"),
        "RAY_DIES": "",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "48",
        "SIGNAL": "",
        "START_TIMEOUT": "60",
        "no_proxy": "intern",
    }
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    yield tmp_path, environment
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(programs) in " ".join(process.cmdline()):
                process.kill()


def start(stage, *arguments: str, **more: str) -> subprocess.Popen:
    folder, environment = stage
    command = ["bash", str(SCRIPT), "configs/ppo_13b.yaml", str(folder / "run"), *arguments]
    return subprocess.Popen(
        command, env={**environment, **more}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def log_of(stage) -> list[str]:
    log = stage[0] / "log"
    return log.read_text().splitlines() if log.exists() else []


def wait_for(stage, text: str) -> None:
    until = time.monotonic() + 60
    while not any(text in line for line in log_of(stage)):
        assert time.monotonic() < until, f"{text!r} never came: {log_of(stage)}"
        time.sleep(0.05)


def test_asks_slurm_for_the_machines_of_its_configuration():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SCRIPT.read_text(), re.M))
    (nodes,) = yaml.safe_load((ROOT / "configs" / "ppo_13b.yaml").read_text())["cluster"]["nodes"]
    assert (int(options["nodes"]), int(options["gpus-per-node"])) == (nodes["count"], nodes["gpus"])
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"
    assert options["signal"].startswith("B:USR1@")  # to the script itself, which passes it on


def test_head_workers_run_and_end(stage):
    process = start(stage, "ppo.steps=5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    log = log_of(stage)
    head = next(line for line in log if line.startswith("srun") and "--head" in line)
    assert "--nodes=1 --ntasks=1 --nodelist=node-a ray start --head --block --node-ip-address=10.0.0.7" in head
    assert "--num-gpus=8" in head and "--temp-dir=/tmp/ray-42" in head
    workers = next(line for line in log if line.startswith("srun") and "--address" in line)
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=node-b,node-c ray start --block" in workers
    assert "--address=10.0.0.7:6379" in workers
    assert log.index(head) < log.index(workers), "the head comes first"
    submitted = f"rayrlhf submit configs/ppo_13b.yaml ppo.steps=5 run_dir={stage[0] / 'run'}"
    assert f"{submitted} --address http://10.0.0.7:8265 --on-interrupt stop --stop-seconds 270" in log
    assert "not through a proxy: 10.0.0.7,intern" in log
    assert log.count("all cores") == 3, "each step has those that the job has"
    assert log.count("token ok") == 2 and not any("64" in line and "TOKEN" in line for line in log)
    assert sum(line.startswith("ended: ray start") for line in log) == 2, "both steps end with the run"
    assert not any("ray stop" in line or "requeue" in line for line in log)


def test_the_run_has_the_time_that_slurm_leaves_to_save():
    text = SCRIPT.read_text()
    left, saving = (
        int(re.search(pattern, text).group(1)) for pattern in (r"--signal=B:USR1@(\d+)", r"--stop-seconds (\d+)")
    )
    assert left - 60 < saving < left - 15, "the rest is for Ray's own end, and for queueing again"


@pytest.mark.parametrize("addresses", ["127.0.1.1 fe80::7 127.0.0.2", ""])
def test_a_head_without_an_address_is_told(stage, addresses):
    process = start(stage, ADDRESSES=addresses)
    output, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 1
        and f'node-a has no IPv4 address that other nodes reach: `hostname -I` says "{addresses}"' in output
    )
    assert not any("ray start" in line for line in log_of(stage))


def test_fails_as_the_run_fails_and_resumes_what_is_there(stage):
    (stage[0] / "run").mkdir()
    (stage[0] / "run" / "config.yaml").touch()
    process = start(stage, SUBMIT_CODE="2")
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert any(line.startswith("rayrlhf submit") and line.endswith("--resume") for line in log_of(stage))


@pytest.mark.parametrize(("number", "queued_again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_end_of_time_and_preemption(stage, number, queued_again):
    process = start(stage, SUBMIT_SECONDS="600")
    wait_for(stage, "rayrlhf submit")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    log = log_of(stage)
    assert "interrupted" in log, "the run is told to save"
    # Slurm itself queues what it preempts.
    assert ("scontrol requeue 42" in log) == queued_again
    assert sum(line.startswith("ended: ray start") for line in log) == 2


def test_the_end_of_time_before_the_run_begins_stops_it_as_it_begins(stage):
    process = start(stage, SUBMIT_SECONDS="6000", SIGNAL="USR1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "the run is told to stop and save" in output
    assert "scontrol requeue 42" in log_of(stage)


def test_a_head_that_dies_ends_the_wait(stage):
    process = start(stage, RAY_DIES="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "a step has ended" in output
    assert not any(line.startswith("rayrlhf") for line in log_of(stage))


@pytest.mark.parametrize(
    "script", sorted(path.name for path in Path(ROOT / "launch").glob("*.s*") if path.suffix != ".yaml")
)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--severity=warning", str(ROOT / "launch" / script)], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout
