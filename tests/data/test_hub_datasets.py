"""Prompts of Hugging Face datasets, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from rayrlhf.errors import InputRefused

ROWS = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": None}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_local_folder(load: Any, tmp_path: Path) -> None:
    folder = tmp_path / "facts"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [{"prompt": f"{split} {n}", "messages": [{"role": "user", "content": str(n)}], "n": n} for n in (1, 2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load(prompts=str(folder), split="test")
    assert [(prompt.text, prompt.row["n"]) for prompt in loaded.train] == [("test 1", 1), ("test 2", 2)]
    assert loaded.train[1].where == f"{folder}, row 2"
    chat = load(prompts=str(folder), prompt_column="messages", limit=1)
    assert [prompt.text for prompt in chat.train] == ["1"] and chat.report.sources[0].conversations == 1
    with pytest.raises(InputRefused, match="can't be loaded as a dataset .*[Uu]nknown split .*Legal: a .jsonl"):
        load(prompts=str(folder), split="tset")


def test_an_empty_folder(load: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused) as refused:
        load(prompts=str(tmp_path / "empty"))
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(f"{tmp_path / 'empty'}: the folder can't be loaded as a dataset (")


def test_name_subset_and_split_reach_the_library(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [prompt.text for prompt in load(prompts="some/facts", subset="main", split="test", limit=2).train] == [
        "one",
        "two",
    ]
    assert calls == [("some/facts", "main", "test")]
    with pytest.raises(InputRefused) as refused:
        load(prompts="some/facts")
    assert refused.value.problems == ["some/facts, row 3: the prompt is null, not a string"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"prompt": []}))
    with pytest.raises(InputRefused) as refused:
        load(prompts="some/facts")
    assert refused.value.problems == ["some/facts: split 'train' has no rows"]


LEGAL = "Legal: a .jsonl, .json, .parquet or .csv file, a folder with such files, or the name of a dataset on the Hub."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ConnectionError("Couldn't reach 'some/facts' on the Hub (LocalEntryNotFoundError)"),
            "and the Hugging Face Hub can't be reached to look for a dataset of that name (ConnectionError: Couldn't "
            "reach 'some/facts' on the Hub (LocalEntryNotFoundError)).",
        ),
        (
            DatasetNotFoundError("Dataset 'some/facts' doesn't exist on the Hub or cannot be accessed.\nMore."),
            "and no dataset of that name on the Hugging Face Hub, or it needs a login (DatasetNotFoundError: Dataset "
            "'some/facts' doesn't exist on the Hub or cannot be accessed).",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
            "and the Hugging Face dataset of that name can't be loaded (ValueError: Config name is missing).",
        ),
    ],
    ids=["no network", "unknown name", "anything else"],
)
def test_what_goes_wrong_is_one_clear_refusal(
    load: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(InputRefused) as refused:
        load(prompts="some/facts")
    assert refused.value.problems == [
        f"some/facts: there is no file or folder 'some/facts' (data.prompts), {expected} {LEGAL}"
    ]


def test_offline_mode_of_the_real_library(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputRefused) as refused:
        load(prompts="nobody-here/no-such-dataset")
    assert len(refused.value.problems) == 1 and LEGAL in str(refused.value)
    assert "the Hugging Face Hub can't be reached" in str(refused.value)


def test_names_that_can_only_be_paths_are_not_looked_up(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, AssertionError("looked up"))
    for name in ("no/such/folder", "./facts", "/nowhere/facts", "facts.jsonl"):
        with pytest.raises(InputRefused, match="there is no such file"):
            load(prompts=name)
