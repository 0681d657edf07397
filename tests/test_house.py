"""The rules of the house: layers, sizes, a quick command line, commands that say what they should."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rayrlhf.cli import _told_plainly
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT

SOURCES = [p for folder in ("rayrlhf", "actors", "examples", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    line = [sys.executable, "-m", "rayrlhf.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_imports_point_one_way():
    checked = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_linter_finds_nothing():
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_on_few_screens(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize(
    "module",
    ["rayrlhf", "rayrlhf.config", "rayrlhf.cli", "rayrlhf.drivers.pipeline", "rayrlhf.drivers.pipeline_inputs"],
)
def test_light_modules_load_nothing_heavy(module: str):
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["nodes", "ray_end", "ray_logs", "ray_share"])
def test_what_runs_on_nodes_for_a_moment_needs_no_torch(module: str):
    code = f"import sys, rayrlhf.cluster.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_names_every_command():
    helped = command("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in ("train", "plan", "generate", "doctor"))


def test_plan_starts_nothing_and_shows_the_arithmetic():
    planned = command("plan", "configs/ppo_local.yaml", "ppo.prompts_per_step=16")
    assert planned.returncode == 0, planned.stderr
    assert "16 samples" in planned.stdout and "critic" in planned.stdout


def test_a_bad_configuration_is_refused_with_exit_code_2():
    refused = command("train", "configs/ppo_local.yaml", "ppo.minibatch_samples=3", "ppo.gama=0.9")
    assert refused.returncode == 2
    assert (
        "Refused: 2 problems" in refused.stderr and "ppo.gamma" in refused.stderr and "Traceback" not in refused.stderr
    )


@pytest.mark.parametrize(("started", "said"), [(False, "2 problems, nothing was started."), (True, "2 problems.")])
def test_what_was_started_is_not_denied(capsys, started, said):
    with pytest.raises(typer.Exit) as left, _told_plainly():
        raise InputRefused(["a", "b"], started=started)
    assert left.value.exit_code == 2 and capsys.readouterr().err == f"Refused: {said}\n  - a\n  - b\n"


def test_doctor_names_versions_and_cures():
    looked = command("doctor")
    assert looked.returncode == 0, looked.stdout
    assert all(name in looked.stdout for name in ("torch", "ray", "vllm", "deepspeed", "cores", "memory"))


def test_the_project_speaks_of_itself_alone():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, timeout=30, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("no git checkout")
    hosts = ["py" + "pi.org", "files.python" + "hosted", "registry." + "npmjs", "download." + "pytorch.org"]
    for name in tracked.stdout.splitlines():
        file = ROOT / name
        if not file.is_file() or file.is_symlink():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        assert not [host for host in hosts if host in text], name
