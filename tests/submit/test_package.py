"""What travels with a job."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

from rayrlhf.config import load_config
from rayrlhf.drivers import submit_package
from rayrlhf.drivers.submit_folder import own_address
from rayrlhf.drivers.submit_package import CONFIG_FILE, named_paths, shipped_files, write_archive
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT

CONFIG = """
run_dir: runs/a
policy: {path: build/model}
reward: {sources: [{function: "rewards.words:short"}, {model: /models/reward}]}
data: {prompts: data/prompts.jsonl}
ppo: {steps: 1, prompts_per_step: 2, minibatch_samples: 2}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder."""
    root = tmp_path / "project"
    for name in (
        *("config.yaml", "loop.py", "rewards/words.py", "build/model/config.json", "build/other/large.bin"),
        *("data/prompts.jsonl", "data/secret.txt", "runs/a/metrics.jsonl", "runs/b/metrics.jsonl", ".git/HEAD"),
        *(".venv/bin/python", "__pycache__/loop.pyc", "sub/runs/kept.txt", "sub/__pycache__/x.pyc", ".mypy_cache/x"),
        *("sub/notes.md", "sub/draft.md"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "config.yaml").write_text(CONFIG)
    (root / ".gitignore").write_text("/data/\n*.log\n")
    (root / "sub" / ".rayignore").write_text("*.md\n!notes.md\n")
    (root / "a.log").write_text("x")
    return root


def own(files) -> set[str]:
    """The user's part of what travels."""
    return {str(place) for place in files if place.parts[0] != "rayrlhf"}


def test_code_travels_and_outputs_stay(project):
    assert own(shipped_files(project, [], [project / "runs" / "a"])) == {
        *("config.yaml", "loop.py", "rewards/words.py", "sub/runs/kept.txt", "sub/notes.md", ".gitignore"),
        "sub/.rayignore",
    }


def test_what_the_configuration_names_travels_in_any_case(project):
    (project / ".rayignore").write_text("rewards\n")
    named = named_paths(load_config(project / "config.yaml"), project)
    files = own(shipped_files(project, named))
    assert {"build/model/config.json", "data/prompts.jsonl", "rewards/words.py"} <= files
    assert not {"build/other/large.bin", "data/secret.txt", "runs/a/metrics.jsonl"} & files


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.prompts=../prompts.jsonl", ["data.prompts", "doesn't lie below", "absolute path"]),
        ("data.prompts=data/promts.jsonl", ["data.prompts", "'data/promts.jsonl'", "no such file"]),
        ("policy.path=build/modle", ["policy.path", "'build/modle'"]),
        ("policy.chat_template=chat.jinja", ["policy.chat_template", "no such file"]),
    ],
)
def test_paths_that_only_lie_here_are_refused(project, override, words):
    (project.parent / "prompts.jsonl").write_text("{}")
    with pytest.raises(InputRefused) as refused:
        named_paths(load_config(project / "config.yaml", [override]), project)
    (problem,) = refused.value.problems
    assert all(word in problem for word in words)


def test_names_and_absolute_paths_are_the_clusters(project):
    config = load_config(
        project / "config.yaml", ["policy.path=meta-llama/Llama-3.1-8B", "data.prompts=/shared/prompts.jsonl"]
    )
    assert named_paths(config, project) == [project / "rewards" / "words.py"]


def test_the_library_travels_with_its_linked_roles(project, tmp_path):
    files = shipped_files(project)
    write_archive(tmp_path / "job.zip", files, "seed: 1\n")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        names = archive.namelist()
        assert archive.read(CONFIG_FILE) == b"seed: 1\n"
        assert archive.read("rayrlhf/actors/policy.py") == (ROOT / "actors" / "policy.py").read_bytes()
        assert not any("__pycache__" in name for name in names)
        assert any(name.startswith("rayrlhf/evaluation/templates/") for name in names)
        assert any(name.startswith("rayrlhf/planning/catalogue/") for name in names)


def test_the_same_content_is_the_same_archive(project, tmp_path):
    for name in "ab":
        write_archive(tmp_path / name, shipped_files(project), "seed: 1\n")
        os.utime(project / "loop.py", (1, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (project / "loop.py").write_text("changed")
    write_archive(tmp_path / "b", shipped_files(project), "seed: 1\n")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_too_much_is_refused_with_the_largest_parts(project, monkeypatch):
    monkeypatch.setattr(submit_package, "LIMIT_BYTES", 20 << 20)
    with open(project / "sub" / "weights.bin", "wb") as file:
        file.truncate(30 << 20)
    with pytest.raises(InputRefused) as refused:
        shipped_files(project)
    (problem,) = refused.value.problems
    assert "20.0 MiB can be packed" in problem and "largest parts: sub/weights.bin (30.0 MiB)" in problem
    monkeypatch.setattr(submit_package, "LIMIT_FILES", 10)
    with pytest.raises(InputRefused, match="more than 10 files"):
        shipped_files(project)


def test_an_archive_that_the_dashboard_does_not_take_is_refused(project, tmp_path, monkeypatch):
    """What counts is what is sent: 30 MiB that pack well can go, 8 that don't can't."""
    assert submit_package.LIMIT_PACKED < DASHBOARD_CLIENT_MAX_SIZE
    monkeypatch.setattr(submit_package, "LIMIT_PACKED", 6 << 20)
    (project / "zeros.txt").write_bytes(bytes(30 << 20))
    assert write_archive(tmp_path / "job.zip", shipped_files(project), "seed: 1\n") < 6 << 20
    (project / "sub" / "model.bin").write_bytes(random.Random(1).randbytes(8 << 20))
    with pytest.raises(InputRefused) as refused:
        write_archive(tmp_path / "job.zip", shipped_files(project), "seed: 1\n")
    (problem,) = refused.value.problems
    assert "6.0 MiB can be sent" in problem and "largest parts: sub/model.bin (8.0 MiB)" in problem


def test_links_are_followed_and_never_in_circles(project):
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool.py").write_text("x")
    (project / "tools").symlink_to(elsewhere)
    (project / "sub" / "up").symlink_to(project)
    (project / "broken").symlink_to(project / "nothing")
    files = own(shipped_files(project))
    assert "tools/tool.py" in files and not any("up" in Path(name).parts or name == "broken" for name in files)


def test_another_rayrlhf_is_refused(project):
    (project / "rayrlhf").mkdir()
    (project / "rayrlhf" / "__init__.py").touch()
    with pytest.raises(InputRefused, match="is not the rayrlhf of this command"):
        shipped_files(project)


def test_a_job_knows_the_cluster_in_which_it_runs(tmp_path):
    told = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert own_address(tmp_path, told) == "10.0.0.1:6379"
    port = tmp_path / "gcs_server_port_0a"
    port.write_text("6379")
    assert own_address(tmp_path, told) == "10.0.0.1:6379"
    port.write_text("41234")
    host, found = own_address(tmp_path, told).split(":")
    assert found == "41234" and host.count(".") == 3 and host != "10.0.0.1"
