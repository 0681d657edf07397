"""The check of data: thirty planted defects, each at its line, and clean files, in which nothing is found."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.config.schema import DataConfig
from rayrlhf.data import CheckReport, check_file
from rayrlhf.errors import InputRefused
from rayrlhf.monitoring.data_check import render_check

LONG = "a good answer that goes on for quite a while and tells all that there is to tell of it"
USER = {"role": "user", "content": "how are you"}


def pair(prompt: Any = "hello", chosen: Any = "one", rejected: Any = "two", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def talk(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def found(report: CheckReport) -> list[tuple[int, str, str]]:
    return [(finding.number, finding.severity, finding.kind) for finding in report.findings]


PLANTED: list[tuple[Any, list[tuple[str, str]]]] = [
    (pair("prompt 1"), []),
    ('{"prompt": "prompt 2", "chosen": "one"', [("error", "malformed")]),
    ("[1, 2]", [("error", "malformed")]),
    (b'{"prompt": "prompt 4", "chosen": "caf\xe9", "rejected": "b"}', [("error", "malformed")]),
    (pair("prompt 5", chosen=""), [("error", "empty_response")]),
    (pair("prompt 6", rejected=" \n"), [("error", "empty_response")]),
    (pair("", chosen="of nothing"), [("error", "empty_prompt")]),
    (pair("prompt 8", chosen=None), [("error", "wrong_type")]),
    (pair("prompt 9", rejected=3), [("error", "wrong_type")]),
    (pair("prompt 10", chosen={"text": "one"}), [("error", "wrong_type")]),
    (pair(17), [("error", "wrong_type")]),
    ({"prompt": "prompt 12", "chosen": "one"}, [("error", "missing_column")]),
    (pair("prompt 13", "the same", "the same"), [("error", "identical")]),
    (pair("prompt 1"), [("warning", "duplicate")]),
    (pair("prompt 15", "left", "right"), [("warning", "contradiction")]),
    (pair("prompt 15", "right", "left"), [("warning", "contradiction")]),
    (pair("prompt 17", "Yes.", LONG), [("warning", "swapped")]),
    (pair("prompt 18", LONG[:45], LONG), [("warning", "swapped")]),
    (pair("prompt 19", "... !", "a word"), [("warning", "swapped")]),
    (pair("prompt 20", "go on " * 10, LONG), [("warning", "swapped")]),
    (pair("prompt 21", margin=-0.5), [("error", "margin")]),
    ('{"prompt": "prompt 22", "chosen": "a", "rejected": "b", "margin": NaN}', [("error", "margin")]),
    (pair("prompt 23", margin="large"), [("error", "margin")]),
    (pair("prompt 24", chosen="bell\x07"), [("warning", "characters")]),
    (pair("prompt 25", rejected="it\u00e2\u20ac\u2122s"), [("warning", "characters")]),
    (pair("prompt 26", chosen="caf\u00c3\u00a9"), [("warning", "characters")]),
    (pair("prompt 27", rejected="lost \ufffd"), [("warning", "characters")]),
    (pair(talk("user", "bot"), "a", "b"), [("error", "wrong_type")]),
    (pair(talk("user", "assistant"), "a", "b"), [("error", "role_order")]),
    (pair(talk("user", "user"), "a", "b"), [("warning", "role_order")]),
    (pair(talk("user", "system", "user"), "a", "b"), [("warning", "role_order")]),
    (pair([USER], talk("user") + answer("a"), [USER, *answer("b")]), [("error", "prompt_differs")]),
    (pair(None, [USER, *answer("a")], talk("user") + answer("b")), [("error", "prompt_differs")]),
    (pair(None, "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"), [("error", "prompt_differs")]),
    (pair(None, "no prompt", "at all"), [("error", "missing_prompt")]),
    (pair([USER], talk("user"), "b"), [("error", "role_order")]),
    (pair("prompt 37", "one\n\nHuman: more", "b"), [("warning", "prompt_differs")]),
    (pair("prompt 38 is long", "prompt 38 is long one", "prompt 38 is long two"), [("warning", "prompt_repeated")]),
    ("", [("error", "malformed")]),
    (pair([USER], "a", "b"), []),
    (pair("prompt 41", LONG, "Yes."), []),
]


def planted() -> bytes:
    raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
           for line, _ in PLANTED]  # fmt: skip
    return b"\n".join(raw) + b"\n"


def test_each_planted_defect_is_found_at_its_line_and_nothing_else(write: Any) -> None:
    path = write(planted(), "pairs.jsonl")
    report = check_file(path)
    expected = [(number, *one) for number, (_, many) in enumerate(PLANTED, start=1) for one in many]
    assert len(expected) >= 30
    assert found(report) == expected
    assert {finding.where for finding in report.findings} == {f"{path}:{number}" for number, _, _ in expected}
    assert report.files[0].kind == "pairs"


def test_an_error_is_what_refuses_a_run(write: Any, load_fixed: Any, byte_tokenizer: Any) -> None:
    path, tokenizer = write(planted(), "pairs.jsonl"), byte_tokenizer(template=TURNS)
    report = check_file(path, tokenizer)
    with pytest.raises(InputRefused) as refused:
        load_fixed("pairs", train=path, tokenizer=tokenizer)
    told = [problem.split(": ", 1)[0] for problem in refused.value.problems]
    errors = [f"{path}, line {finding.number}" for finding in report.errors]
    # of all problems the refusal spells out the first twenty
    assert told[:20] == errors[:20] and refused.value.problems[20] == f"... and {len(errors) - 20} more problems"
    kept = [row for row, many in PLANTED if not any(severity == "error" for severity, _ in many)]
    loaded = load_fixed("pairs", kept, tokenizer=tokenizer)
    assert len(loaded.train) == len(kept)


def test_planted_defects_of_labelled_completions(write: Any) -> None:
    def row(prompt: str, completion: Any = "one", label: Any = True) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "label": label}

    rows = [row(f"prompt {i}", label=i % 2 == 0) for i in range(8)]
    rows += [
        row("a", label=1), row("b", label="true"), row("c", label=None), row("d", completion=""),
        row("prompt 0"), row("prompt 2", label=False), row("prompt 3 once more", "prompt 3 once more, and what follows"),
    ]  # fmt: skip
    assert found(check_file(write(rows))) == [
        (3, "warning", "contradiction"),
        (9, "error", "label"),
        (10, "error", "label"),
        (11, "error", "label"),
        (12, "error", "empty_response"),
        (13, "warning", "duplicate"),
        (14, "warning", "contradiction"),
        (15, "warning", "prompt_repeated"),
    ]
    one_sided = [row(f"prompt {i}", label=i > 0) for i in range(11)]
    assert found(check_file(write(one_sided, "one.jsonl"))) == [(0, "warning", "unbalanced")]
    assert found(check_file(write(one_sided[:10], "two.jsonl"))) == []


def test_planted_defects_of_conversations(write: Any) -> None:
    rows = [
        {"messages": talk("system", "user", "assistant")},
        {"messages": talk("user")},
        {"messages": talk("user", "assistant", "user")},
        {"messages": talk("assistant", "user", "assistant")},
        {"messages": talk("user", "assistant", "assistant")},
        {"messages": [USER, *answer("")]},
        {"messages": []},
        {"messages": talk("system", "user", "assistant")},
        {"messages": [{"role": "user"}]},
    ]
    assert found(check_file(write(rows))) == [
        (2, "error", "role_order"),
        (3, "error", "role_order"),
        (4, "error", "role_order"),
        (5, "warning", "role_order"),
        (6, "error", "empty_response"),
        (7, "error", "wrong_type"),
        (8, "warning", "duplicate"),
        (9, "error", "wrong_type"),
    ]


CLEAN: dict[str, tuple[str, Any]] = {
    "plain": ("pairs", [pair(f"p{i}", f"good {i}", f"bad {i}", margin=i / 2) for i in range(3)]),
    "longer": ("pairs", [pair("why", "for a reason of some forty characters ok", LONG)]),
    "messages": ("pairs", [pair([USER], answer("a"), answer("b")), pair(talk("user"), answer("c"), answer("d"))]),
    "implicit": ("pairs", [{"chosen": [USER, *answer("a")], "rejected": [USER, *answer("b")]}]),
    "hh": (
        "pairs",
        [{k: f"\n\nHuman: {i}\n\nAssistant: {i}{k}" for k in ("chosen", "rejected")} for i in ("one", "two")],
    ),
    "repeated prompt": ("pairs", [pair(f"question {i}", f"question {i} good", f"question {i} bad") for i in range(3)]),
    "labelled": ("labelled", [{"prompt": f"p{i}", "completion": "c", "label": i < 2} for i in range(4)]),
    "completions": ("examples", [{"prompt": f"p{i}", "completion": "Größe – “quoted” 😀 naïve"} for i in range(3)]),
    "conversations": ("examples", [{"messages": talk("system", "user", "assistant", "user", "assistant")}]),
    "prompts": ("prompts", [{"prompt": "p1"}, {"prompt": [USER]}]),
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_in_clean_files_nothing_is_found(
    write: Any, tmp_path: Any, byte_tokenizer: Any, name: str, suffix: str
) -> None:
    kind, rows = CLEAN[name]
    if suffix == ".parquet":
        import pyarrow.parquet

        if name == "prompts":
            pytest.skip("a Parquet column has one type")
        path = str(tmp_path / "clean.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = write(rows if suffix == ".jsonl" else json.dumps(rows), "clean" + suffix)
    for tokenizer in (None, byte_tokenizer(template=TURNS)):
        report = check_file(path, tokenizer)
        assert found(report) == [] and report.files[0].kind == kind
        assert len(report.files[0].records) == len(rows)


def test_rows_of_a_list_in_one_line_are_numbered(write: Any) -> None:
    path = write(json.dumps([pair("a"), pair("b", ""), pair("a")]), "list.json")
    assert [finding.where for finding in check_file(path).findings] == [f"{path}:row 2", f"{path}:row 3"]


def test_a_file_of_no_known_kind_says_what_is_known(write: Any) -> None:
    (finding,) = check_file(write([{"promt": "a", "answer": "b"}])).findings
    assert finding.severity == "error" and finding.kind == "missing_column" and "'prompt'" in finding.text
    (finding,) = check_file(write([{"prompt": "a"}], "b.jsonl"), kind="examples").findings
    assert finding.kind == "missing_column" and "no column 'completion'" in finding.text
    (finding,) = check_file("no/such/file.jsonl").findings
    assert "there is no such file" in finding.text


# -- with a tokenizer -------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_configuration(write: Any, words: Any) -> None:
    rows = [
        pair("one two three"),
        pair("one", "one two three four", "two"),
        pair("five", "one two three one", "one two three two"),
    ]
    path = write(rows)
    keys = {"train": path, "max_prompt_tokens": 3, "max_tokens": 5, "validation_fraction": 0.0}
    assert found(check_file(ExamplesConfig(**keys, overlong="truncate"), words)) == [
        (1, "warning", "overlong"),
        (2, "warning", "overlong"),
        (3, "warning", "overlong"),
        (3, "warning", "same_tokens"),
    ]
    assert found(check_file(ExamplesConfig(**keys, overlong="refuse"), words))[1:] == [
        (1, "error", "overlong"),
        (2, "error", "overlong"),
        (3, "error", "overlong"),
    ]
    assert found(check_file(ExamplesConfig(**keys), words))[0] == (0, "error", "overlong")


def test_ends_of_responses_and_special_tokens(write: Any, words: Any) -> None:
    rows = [
        pair("one", "two </s>", "three </s>"),
        pair("two", "two </s>", "three </s>"),
        pair("three", "one", "two"),
        pair("four </s>", "one </s>", "two </s>"),
        pair("five", "one </s> two </s>", "two </s>"),
    ]
    assert found(check_file(write(rows), words)) == [
        (3, "warning", "missing_eos"),
        (4, "warning", "special_token"),
        (5, "warning", "special_token"),
    ]


def test_trouble_with_the_template(write: Any, word_tokenizer: Any) -> None:
    path = write([pair([USER], "one", "two"), pair(talk("user"), "one", "two")])
    (finding,) = check_file(path, word_tokenizer(template=None)).findings
    assert finding.severity == "error" and finding.kind == "template" and "2 of 2 prompts need" in finding.text
    strict = "{% if messages[0].content == 'user 0' %}{{ raise_exception('not so') }}{% endif %}[user] one [end] "
    report = check_file(path, word_tokenizer(template=strict + "{{ messages[-1].content }} [end]"))
    assert (2, "error", "template") in found(report)
    endless = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    endless += "{% if add_generation_prompt %}[assistant] {% endif %}"
    assert found(check_file(path, word_tokenizer(template=endless))) == [(0, "warning", "missing_eos")]


# -- configurations ---------------------------------------------------------------------------------------------------


def test_prompts_of_train_that_are_held_out_are_leaks(write: Any, words: Any) -> None:
    train = write([pair("one"), pair("two"), pair("three")], "train.jsonl")
    held_out = write([pair("two", "a", "b"), pair("four")], "held_out.jsonl")
    report = check_file(ExamplesConfig(train=train, validation=held_out))
    assert found(report) == [(2, "warning", "leak")]
    assert f"{held_out}:1" in report.findings[0].text and report.findings[0].file == train
    report = check_file(ExamplesConfig(train=train, validation=train))
    assert [finding.kind for finding in report.errors] == ["leak"]
    # duplicates are those of one side, over all of its files
    mixture = ExamplesConfig(train=[{"path": train}, {"path": write([pair("two")], "more.jsonl")}])
    assert [(f.where.rsplit("/", 1)[-1], f.kind) for f in check_file(mixture).findings] == [
        ("more.jsonl:1", "duplicate")
    ]


def test_keys_are_checked_too(write: Any, words: Any) -> None:
    path = write([pair("one")])
    keys = {"train": path, "max_prompt_tokens": 9, "max_tokens": 8}
    assert [(f.where, f.severity) for f in check_file(ExamplesConfig(**keys)).findings] == [("data", "error")] * 2
    report = check_file(ExamplesConfig(train=path, validation_fraction=0.0, system_prompt="be kind"), words)
    assert "data.system_prompt" in report.errors[0].text
    prompts = DataConfig(prompts=write([{"prompt": "one"}, {"prompt": "one"}, {"prompt": ""}], "p.jsonl"))
    assert found(check_file(prompts, words)) == [(2, "warning", "duplicate"), (3, "error", "empty_prompt")]


# -- with a reward model ----------------------------------------------------------------------------------------------


def test_a_reward_model_tells_swapped_pairs(write: Any) -> None:
    worth = {"good": 3.0, "bad": 1.0, "fair": 1.5}
    rows = [
        pair("a", "good", "bad"),
        pair("b", "bad", "good"),
        pair("c", "bad", "fair"),
        pair("d", "good", "bad " + LONG),
    ]

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        assert prompts == ["a", "b", "c", "d"]
        return [worth[response.split()[0]] for response in responses]

    # the third lies too close together to say, and the looks of the fourth don't matter any more
    assert found(check_file(write(rows), score=score)) == [(2, "warning", "swapped")]
    with pytest.raises(InputRefused, match="one finite number for each"):
        check_file(write(rows), score=lambda prompts, responses: [float("nan")] * 4)


# -- as it is shown ---------------------------------------------------------------------------------------------------


def test_the_report_is_shown_and_written(write: Any) -> None:
    report = check_file(write(planted(), "pairs.jsonl"))
    out = io.StringIO()
    render_check(report, Console(file=out, width=200), most=5)
    shown = out.getvalue()
    assert "pairs.jsonl:2: error malformed" in shown and f"... and {len(report.findings) - 5} more" in shown
    assert "\x07" not in shown and "contradiction" in shown
    written = json.loads(json.dumps(report.as_dict()))
    assert written["files"][0]["rows"] == len(PLANTED) - 4 and written["files"][0]["kind"] == "pairs"
    assert written["findings"][0].keys() == {"severity", "where", "kind", "text"}
    assert any("(and 4 more of this kind)" in line for line in report.lines())
    out = io.StringIO()
    render_check(check_file(write([pair("one")], "clean.jsonl")), Console(file=out, width=200))
    assert "nothing found" in out.getvalue()
