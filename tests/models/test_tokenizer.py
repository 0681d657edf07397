"""Which tokens end a response, and chat templates from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.errors import InputRefused
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer


def folder_with(llama: Path, folder: Path, *, config: Any, generation: Any) -> Path:
    """The llama with these ``eos_token_id`` in its files; None: none, ``"no file"`` as it says."""
    shutil.copytree(llama, folder)
    stored = json.loads((folder / "config.json").read_text())
    stored.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(stored if config is None else {**stored, "eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation != "no file":
        (folder / "generation_config.json").write_text(
            json.dumps({} if generation is None else {"eos_token_id": generation})
        )
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "own", "expected"),
    [
        (None, "no file", 2, [2]),
        (5, None, 2, [2, 5]),
        (5, [9, 7], 2, [2, 5, 7, 9]),
        ([2, 11], "no file", 2, [2, 11]),
        ([2, 11], [11], None, [2, 11]),
        (0, None, None, [0]),
        (0, 0, 0, [0]),
    ],
)
def test_every_eos_token(llama: Path, tmp_path: Path, config: Any, generation: Any, own: Any, expected: Any) -> None:
    folder = folder_with(llama, tmp_path / "m", config=config, generation=generation)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = None if own is None else tokenizer.convert_ids_to_tokens(own)
    assert eos_token_ids(tokenizer, str(folder)) == expected


def test_no_eos_at_all_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = folder_with(llama, tmp_path / "m", config=None, generation=None)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = None
    with pytest.raises(InputRefused, match="no EOS token.*eos_token_id"):
        eos_token_ids(tokenizer, str(folder))


def test_a_name_is_looked_up_in_the_hub_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder_with(llama, snapshot, config=5, generation=[9])
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tokenizer = load_tokenizer(str(llama))
    assert eos_token_ids(tokenizer, "some/model") == [2, 5, 9]
    (snapshot / "generation_config.json").unlink()
    assert eos_token_ids(tokenizer, "some/model") == [2, 5]


def test_tokenizers_and_templates_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    tokenizer = load_tokenizer(str(llama), chat_template=str(template))
    messages = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == [4, 5]
    with pytest.raises(InputRefused, match="policy.chat_template: .*missing.jinja"):
        load_tokenizer(str(llama), chat_template=str(tmp_path / "missing.jinja"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputRefused, match="no tokenizer can be loaded from .*bare"):
        load_tokenizer(str(tmp_path / "bare"))
