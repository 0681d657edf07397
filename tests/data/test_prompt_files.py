"""What is read from files, and what is said about bad ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from rayrlhf.errors import InputRefused

ROWS = [{"prompt": "hello there", "answer": 1}, {"prompt": "how are you", "answer": 2}]


def problems(load: Any, *args: Any, **keys: Any) -> list[str]:
    with pytest.raises(InputRefused) as refused:
        load(*args, **keys)
    # the folder of the files is left out of what they are called
    return [re.sub(r"^/[^:,]*/", "", problem) for problem in refused.value.problems]


def texts_and_rows(loaded: Any) -> list[tuple[str, dict]]:
    return [(prompt.text, prompt.row) for prompt in loaded.train]


# -- the same rows from every kind of file ----------------------------------------------------------------------------

SAME = [("hello there", {"answer": 1}), ("how are you", {"answer": 2})]


def test_jsonl(load: Any) -> None:
    loaded = load(ROWS)
    assert texts_and_rows(loaded) == SAME
    assert [prompt.id for prompt in loaded.train] == [0, 1]
    assert loaded.train[1].where.endswith("prompts.jsonl, line 2")
    assert loaded.report.lines()[-1] == "2 prompts to train on, 0 held out"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2) + "\n\n",
        "\ufeff" + json.dumps(ROWS[0]) + "\r\n" + json.dumps(ROWS[1]) + "\r\n\n",
    ],
    ids=["one line", "indented", "json lines with BOM and CRLF"],
)
def test_json(load: Any, write: Any, text: str) -> None:
    assert texts_and_rows(load(prompts=write(text, "p.json"))) == SAME


def test_parquet_and_csv(load: Any, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    pa.csv.write_csv(table, tmp_path / "p.csv")
    for name in ("p.parquet", "p.csv"):
        loaded = load(prompts=str(tmp_path / name))
        assert texts_and_rows(loaded) == SAME
        assert loaded.train[1].where.endswith(f"{name}, row 2")


def test_csv_keeps_prompts_as_they_stand_there(load: Any, write: Any) -> None:
    text = '\ufeffprompt,n,note\n042,1,\n"two\nlines, and ""quotes""",2,x\nNA,3,y\n'
    loaded = load(prompts=write(text, "p.csv"))
    assert texts_and_rows(loaded) == [
        ("042", {"n": 1, "note": ""}),
        ('two\nlines, and "quotes"', {"n": 2, "note": "x"}),
        ("NA", {"n": 3, "note": "y"}),
    ]


def test_csv_prompts_that_look_like_numbers_are_text(load: Any, write: Any) -> None:
    loaded = load(prompts=write("prompt,n\n042,042\nNA,NA\n", "p.csv"))
    assert texts_and_rows(loaded) == [("042", {"n": 42}), ("NA", {"n": None})]


def test_parquet_conversations_lose_the_nulls_that_arrow_fills_in(
    load: Any, word_tokenizer: Any, tmp_path: Path, ids: Any
) -> None:
    template = "{% for m in messages %}{% if 'name' in m %}two {% endif %}{{ m.content }} {% endfor %}"
    rows = [
        {"prompt": [{"role": "user", "content": "hello", "name": "x"}]},
        {"prompt": [{"role": "system", "content": "there"}, {"role": "user", "content": "fine"}]},
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    loaded = load(prompts=str(tmp_path / "p.parquet"), tokenizer=word_tokenizer(template=template))
    assert [prompt.tokens.tolist() for prompt in loaded.train] == [ids("two hello"), ids("there fine")]


def test_other_separators_than_line_breaks_are_text(load: Any) -> None:
    text = '{"prompt": "one\u2028two\x85three"}\n'
    assert [prompt.text for prompt in load(text).train] == ["one\u2028two\x85three"]


def test_limit_reads_no_further(load: Any) -> None:
    good = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert texts_and_rows(load(good + "\nnot json\n", limit=2)) == SAME
    assert texts_and_rows(load(good, limit=1)) == SAME[:1]


def test_limit_of_the_other_kinds(load: Any, write: Any, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    write("prompt,answer\nhello there,1\nhow are you,2\n", "p.csv")
    write(json.dumps(ROWS)[:-1] + ", oops", "p.json")
    for name in ("p.parquet", "p.csv", "p.json"):
        assert texts_and_rows(load(prompts=str(tmp_path / name), limit=1)) == SAME[:1]


# -- bad files --------------------------------------------------------------------------------------------------------


def test_every_bad_line_is_named_with_what_was_found(load: Any) -> None:
    lines = [
        b'{"prompt": "hello"}',
        b'{"prompt": "hello" "answer": 1}',
        b"",
        b'{"prompt": "hello"',
        b'["hello"]',
        b'{"promt": "hello", "answer": 1}',
        b'{"prompt": null}',
        b'{"prompt": ""}',
        b'{"prompt": "  "}',
        b'{"prompt": 42}',
        b'{"prompt": {"role": "user"}}',
        b'{"prompt": "h\xffllo"}',
        b'{"prompt": "a\\ud800"}',
        b"[" * 100_000,
        b"",
        b"",
    ]
    found = problems(load, b"\n".join(lines))
    found[-1] = found[-1].removesuffix(found[-1][found[-1].index("Error: ") + 5 :])  # Python's words differ
    assert found == [
        "prompts.jsonl, line 2: malformed JSON: Expecting ',' delimiter at column 20, found '\"answer\": 1}'",
        "prompts.jsonl, line 3: the line is empty",
        "prompts.jsonl, line 4: malformed JSON: Expecting ',' delimiter at column 19, found the end",
        'prompts.jsonl, line 5: the line is a list (["hello"]), not an object with columns',
        "prompts.jsonl, line 6: there is no column 'prompt'; the columns are ['promt', 'answer']; "
        "the nearest is 'promt'",
        "prompts.jsonl, line 7: the prompt is null, not a string",
        "prompts.jsonl, line 8: the prompt is empty",
        "prompts.jsonl, line 9: the prompt is only white space",
        "prompts.jsonl, line 10: the prompt is a number (42), not a string or a list of messages",
        'prompts.jsonl, line 11: the prompt is an object ({"role": "user"}), not a string or a list of messages',
        "prompts.jsonl, line 12: byte 0xff at position 14 is not UTF-8",
        r"prompts.jsonl, line 13: the prompt has half of a surrogate pair ('\ud800') at position 2",
        "prompts.jsonl, line 14: malformed JSON: RecursionError",
    ]


def test_bad_conversations(load: Any) -> None:
    user = {"role": "user", "content": "hello"}
    bad = [
        [],
        ["hello"],
        [{"from": "human", "value": "hello"}],
        [{"role": "user"}],
        [{"role": "User", "content": "hello"}],
        [{"role": None, "content": "hello"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [user, {"role": "assistant", "content": "fine"}],
        [user, {"role": "system", "content": "be kind"}],
        [user, {"role": "assistant", "content": "fine"}, {"role": "user", "content": " "}],
    ]
    found = problems(load, [{"prompt": prompt} for prompt in bad])
    assert [problem.split(": ", 1)[1] for problem in found] == [
        "the prompt is an empty list of messages",
        'message 1 is a string ("hello"), not an object with role and content',
        "message 1 has no 'role'; it has ['from', 'value']",
        "message 1 has no 'content'; it has ['role']",
        "message 1 has the role 'User'; legal are system, user, assistant; the nearest is 'user'",
        "message 1 has the role None; legal are system, user, assistant",
        'message 1 has content that is a list ([{"type": "text"}]), not a string',
        "the last message is from the assistant; it must be from the user, as the policy answers it",
        "the last message is from the system; it must be from the user, as the policy answers it",
        "the last message's content is only white space",
    ]
    assert [problem.split(": ")[0] for problem in found] == [f"prompts.jsonl, line {n}" for n in range(1, 11)]


def test_a_column_that_is_nowhere_is_one_problem(load: Any, write: Any) -> None:
    rows = [{"Prompts": "hello", "answer": 1}] * 30
    where = (
        "there is no column 'prompt' (data.prompt_column); the columns are ['Prompts', 'answer']; "
        "the nearest is 'Prompts'"
    )
    assert problems(load, rows) == [f"prompts.jsonl: {where}"]
    assert problems(load, prompts=write("Prompts,answer\nhello,1\n", "p.csv")) == [f"p.csv: {where}"]


def test_twenty_problems_are_listed_and_the_rest_counted(load: Any) -> None:
    found = problems(load, [{"prompt": ""}] * 27)
    assert len(found) == 21
    assert found[19].startswith("prompts.jsonl, line 20: ") and found[20] == "... and 7 more problems"
    assert len(problems(load, [{"prompt": ""}] * 20)) == 20


def test_problems_of_both_files_come_together(load: Any, write: Any) -> None:
    found = problems(load, [{"prompt": ""}], eval_prompts=write("{", "e.jsonl"), held_out=1)
    assert [problem.split(": ")[0] for problem in found] == ["prompts.jsonl, line 1", "e.jsonl, line 1"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_empty_files(load: Any, write: Any, name: str) -> None:
    for content in ("", "\n \n"):
        assert problems(load, prompts=write(content, name)) == [f"{name}: the file is empty"]


def test_files_without_rows(load: Any, write: Any, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "p.parquet")
    for name in ("p.parquet", write("prompt\n", "p.csv")):
        found = problems(load, prompts=str(tmp_path / name))
        assert found == [f"{os.path.basename(name)}: it has the columns ['prompt'], but no rows"]
    assert problems(load, prompts=write("[ ]", "p.json")) == ["p.json: the list is empty"]


def test_missing_files_and_folders(load: Any, write: Any, tmp_path: Path) -> None:
    write(ROWS, "prompts.jsonl")
    missing = str(tmp_path / "promts.jsonl")
    (found,) = problems(load, prompts=missing)
    assert found == f"promts.jsonl: there is no such file (data.prompts); the nearest is '{tmp_path / 'prompts.jsonl'}'"
    (found,) = problems(load, prompts=str(tmp_path / "nowhere" / "p.csv"))
    assert f"nor the folder '{tmp_path / 'nowhere'}'" in found
    (tmp_path / "folder.jsonl").mkdir()
    assert problems(load, prompts=str(tmp_path / "folder.jsonl")) == [
        "folder.jsonl: this is a folder, not a .jsonl file (data.prompts)"
    ]
    (found,) = problems(load, prompts=write("hello", "p.txt"))
    assert found == "p.txt: the kind of file is unknown; legal are .jsonl, .json, .parquet, .csv (data.prompts)"


def test_bad_json_files(load: Any, write: Any) -> None:
    cases = {
        '[\n{"prompt": "hello"},\n{"prompt": }\n]': "line 3: malformed JSON: Expecting value, found '}'",
        '[\n{"prompt": "hello"}\n{"a": 1}]': "line 3: malformed JSON: expecting ',' or ']', found '{\"a\": 1}]'",
        '[{"prompt": "hello"},\n': "line 2: malformed JSON: Expecting value, found the end of the file",
        '[{"prompt": "hello"}]\n{}': "line 2: malformed JSON: something stands behind the list, found '{}'",
        '[{"prompt": "hello"},\n3]': "line 2: an element of the list is a number (3), not an object with columns",
        '{"data":\n []}': "p.json: the file is one object with the keys ['data']; "
        "legal: a list of objects, or one object a line",
        '{"prompt": "hello"}\n{"prompt"}': "line 2: malformed JSON: Expecting ':' delimiter at column 10, found '}'",
        "hello": "line 1: malformed JSON: Expecting value at column 1, found 'hello'",
    }
    for text, expected in cases.items():
        (found,) = problems(load, prompts=write(text, "p.json"))
        assert found.removeprefix("p.json, ") == expected
    (found,) = problems(load, prompts=write(b'[\n{"prompt": "h\xffllo"}]', "p.json"))
    assert found == "p.json, line 2: byte 0xff at position 14 is not UTF-8"


def test_bad_csv_files(load: Any, write: Any) -> None:
    found = problems(load, prompts=write("prompt,a\nhello,1\nhello,1,2\nhello\n,4\n", "p.csv"))
    assert found == [
        "p.csv, row 2: it has 3 columns where the header has 2",
        "p.csv, row 3: it has 1 columns where the header has 2",
        "p.csv, row 4: the prompt is empty",
    ]
    (found,) = problems(load, prompts=write("prompt,prompt\nhello,there\n", "p.csv"))
    assert found == "p.csv: the columns ['prompt'] stand there more than once"
    (found,) = problems(load, prompts=write(b"prompt\nhello\nh\xffllo\n", "p.csv"))
    assert found == "p.csv, line 3: byte 0xff at position 2 is not UTF-8"


def test_bad_parquet_files(load: Any, write: Any, tmp_path: Path) -> None:
    (found,) = problems(load, prompts=write("hello", "p.parquet"))
    assert found.startswith("p.parquet: it can't be read as Parquet: ")
    table = pa.table({"prompt": pa.array(["hello", None])})
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    (found,) = problems(load, prompts=str(tmp_path / "p.parquet"))
    assert found == "p.parquet, row 2: the prompt is null, not a string"


def test_keys_of_datasets_say_nothing_for_files(load: Any) -> None:
    found = problems(load, ROWS, split="test", subset="main")
    assert found[0].startswith("data.split = 'test' is for Hugging Face datasets, and ")
    assert found[1].startswith("data.subset = 'main' is for Hugging Face datasets, and ")


def test_the_same_column_twice(load: Any) -> None:
    found = problems(load, ROWS, completion_column="prompt")
    assert found == ["data.prompt_column and data.completion_column are both 'prompt'"]
