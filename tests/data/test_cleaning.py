"""Cleaned copies: what they lack, what stays as it was, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.data import check_file, fix, load_pairs
from rayrlhf.errors import InputRefused


def pair(prompt: Any, chosen: Any = "one", rejected: Any = "two", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


ROWS = [
    pair("a", score=0.10),
    pair("b", chosen=""),
    pair("a", score=7),
    pair("c", "x", "y"),
    pair("c", "y", "x"),
    pair("d", chosen="bell\x07"),
    pair("e, with a comma", "two\nlines"),
    pair("f", margin=-1),
]
KEPT = [0, 5, 6]


def test_a_cleaned_copy_lacks_what_is_wrong_and_keeps_the_rest_byte_for_byte(write: Any, tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[6] = b'{"prompt":   "e",  "chosen": "caf\\u00e9", "rejected": 1.0e0 }'.replace(b"1.0e0", b'"\xc3\xa9"')
    content = b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"{broken", b""])
    path = write(content, "pairs.jsonl")
    out = tmp_path / "clean" / "pairs.jsonl"
    cleaned = fix(check_file(path), out)
    assert Path(path).read_bytes() == content
    assert out.read_bytes().removeprefix(b"\xef\xbb\xbf") == b"".join(lines[i] + b"\r\n" for i in KEPT)
    assert cleaned.written == [out] and cleaned.kept == 3
    assert [(f.number, f.kind) for f in cleaned.removed] == [
        (2, "empty_response"), (3, "duplicate"), (4, "contradiction"), (5, "contradiction"), (8, "margin"),
        (9, "malformed"),
    ]  # fmt: skip
    # what isn't sure to be wrong stays, and is told
    assert [(f.number, f.kind) for f in cleaned.left] == [(6, "characters")]
    assert cleaned.lines()[0] == f"{out}: 3 rows kept, 6 taken out; findings left: 1"
    assert any(line.startswith(f"{path}:4: contradiction") for line in cleaned.lines())
    assert not list(out.parent.glob("*.partial"))
    assert [(f.number, f.kind) for f in check_file(out).findings] == [(2, "characters")]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
@pytest.mark.parametrize("indent", [None, 1])
def test_other_kinds_of_files_are_cleaned_too(
    write: Any, tmp_path: Path, words: Any, suffix: str, indent: int | None
) -> None:
    original = tmp_path / f"pairs{suffix}"
    rows = [{"score": None, "margin": None, **row} for row in ROWS]
    if suffix == ".json":
        original.write_text(json.dumps(rows, indent=indent))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), original)
    else:
        import csv

        with original.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    before = original.read_bytes()
    out = tmp_path / f"clean{suffix}"
    cleaned = fix(check_file(original), out)
    assert original.read_bytes() == before and cleaned.kept == 3
    report = check_file(out)
    assert [f.kind for f in report.findings] == ["characters"]
    copied = [row.values for row in report.files[0].source.rows]
    assert copied == [rows[i] for i in KEPT]
    data = ExamplesConfig(train=str(out), validation_fraction=0.0)
    texts = [item.prompt_text for item in load_pairs(data, words, seed=0).train]
    assert texts == [ROWS[i]["prompt"] for i in KEPT]


def test_a_mixture_is_cleaned_file_by_file(write: Any, tmp_path: Path) -> None:
    train = write([pair("a"), pair("b"), pair("c")], "train.jsonl")
    more = write([pair("c"), pair("d")], "more.jsonl")
    held_out = write([pair("b", "x", "y")], "held_out.jsonl")
    config = ExamplesConfig(train=[{"path": train}, {"path": more}], validation=held_out)
    cleaned = fix(check_file(config), tmp_path / "clean")
    assert [path.name for path in cleaned.written] == ["train.jsonl", "more.jsonl", "held_out.jsonl"]
    prompts = [[json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in cleaned.written]
    assert prompts == [["a", "c"], ["d"], ["b"]]


def test_what_cannot_be_cleaned_is_refused_and_nothing_written(write: Any, tmp_path: Path) -> None:
    path = write([pair("a"), pair("b")], "pairs.jsonl")
    report = check_file(path)
    exists = tmp_path / "exists.jsonl"
    exists.write_text("mine")
    for out, why in {
        path: "exists already",
        str(exists): "exists already",
        str(tmp_path / "out.csv"): "must be one too",
    }.items():
        with pytest.raises(InputRefused, match=why):
            fix(report, out)
    assert exists.read_text() == "mine"
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputRefused, match="no row would be left"):
        fix(check_file(write([pair("a", "")], "bad.jsonl")), out)
    with pytest.raises(InputRefused, match="there is no such file|only files are cleaned"):
        fix(check_file(str(tmp_path / "nowhere.jsonl")), out)
    torn = '[\n{"prompt": "a", "chosen": "b", "rejected": "c"},\n{"prompt": }\n]'
    with pytest.raises(InputRefused, match="what follows line 3 can't be read"):
        fix(check_file(write(torn, "torn.json")), tmp_path / "out.json")
    assert not out.exists() and not (tmp_path / "out.json").exists()
