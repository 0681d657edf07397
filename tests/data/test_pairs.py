"""Preference pairs of every form, against texts and tokens written by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from rayrlhf.errors import InputRefused

USER = {"role": "user", "content": "how are you"}
FINE = {"role": "assistant", "content": "fine thanks"}
ONE = {"role": "assistant", "content": "one"}


def parts(pair: Any) -> list[list[int]]:
    return [pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()]


def refused(load_fixed: Any, *args: Any, **keys: Any) -> list[str]:
    with pytest.raises(InputRefused) as error:
        load_fixed(*args, **keys)
    return [problem.rsplit("/", 1)[-1] for problem in error.value.problems]


# -- explicit prompts -------------------------------------------------------------------------------------------------


def test_strings_get_a_bos_once_and_an_eos_each(load_fixed: Any, ids: Any) -> None:
    rows = [{"prompt": "how are you", "chosen": "fine thanks", "rejected": "one </s>", "margin": 1.5, "who": "me"}]
    (pair,) = load_fixed("pairs", rows).train
    # the second response has its EOS in writing: it gets no other one
    assert parts(pair) == [ids("<s> how are you"), ids("fine thanks </s>"), ids("one </s>")]
    assert {t.dtype for t in (pair.prompt, pair.chosen, pair.rejected)} == {torch.int64}
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == ("how are you", "fine thanks", "one </s>")
    assert pair.margin == 1.5 and pair.row == {"margin": 1.5, "who": "me"} and pair.id == 0
    assert pair.where.endswith("data.jsonl, line 1")


def test_conversations_have_the_header_in_the_prompt_and_end_with_the_turn(load_fixed: Any, ids: Any) -> None:
    by_hand = [
        ids("<s> [user] how are you [end] [assistant]"),
        ids("fine thanks [end]"),
        ids("one [end]"),
    ]
    forms = [
        {"prompt": [USER], "chosen": [FINE], "rejected": [ONE]},
        {"prompt": [USER], "chosen": [USER, FINE], "rejected": [USER, ONE]},
        {"prompt": "how are you", "chosen": [USER, FINE], "rejected": [USER, ONE]},
        {"prompt": "how are you", "chosen": [FINE], "rejected": [ONE]},
        {"prompt": [USER], "chosen": "fine thanks", "rejected": "one"},
        {"prompt": None, "chosen": [USER, FINE], "rejected": [USER, ONE]},
    ]
    loaded = load_fixed("pairs", forms)
    assert [parts(pair) for pair in loaded.train] == [by_hand] * len(forms)
    assert {(p.prompt_text, p.chosen_text, p.rejected_text) for p in loaded.train} == {
        ("how are you", "fine thanks", "one")
    }
    assert all(pair.margin is None for pair in loaded.train)
    assert loaded.report.sources[0].conversations == len(forms)


def test_always_makes_a_conversation_of_strings_with_the_system_prompt(load_fixed: Any, ids: Any) -> None:
    rows = [{"prompt": "hello", "chosen": "one", "rejected": "two"}]
    (pair,) = load_fixed("pairs", rows, chat_template="always", system_prompt="be kind").train
    assert parts(pair) == [
        ids("<s> [system] be kind [end] [user] hello [end] [assistant]"),
        ids("one [end]"),
        ids("two [end]"),
    ]


def test_a_template_without_an_end_of_turn_gets_the_eos(load_fixed: Any, ids: Any, word_tokenizer: Any) -> None:
    plain = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (pair,) = load_fixed("pairs", [{"prompt": [USER], "chosen": "fine", "rejected": "one"}], tokenizer=plain).train
    assert parts(pair) == [ids("[user] how are you [assistant]"), ids("fine </s>"), ids("one </s>")]


def test_the_prompt_s_tokens_do_not_depend_on_the_response(load_fixed: Any, byte_tokenizer: Any) -> None:
    # "l" + "o" would be one token across the border
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "hel", "chosen": "o", "rejected": "p"}]
    (pair,) = load_fixed("pairs", rows, tokenizer=tokenizer).train
    assert [tokenizer.decode(t) for t in parts(pair)] == ["hel", "o<|end|>", "p<|end|>"]
    assert len(pair.prompt) == 3


def test_a_prompt_that_most_responses_repeat_is_taken_off(load_fixed: Any, ids: Any) -> None:
    rows = [
        {"prompt": "how are you", "chosen": "how are you fine", "rejected": "how are you one"},
        {"prompt": "hello", "chosen": "hello two", "rejected": "hello three"},
    ]
    loaded = load_fixed("pairs", rows)
    assert parts(loaded.train[0]) == [ids("<s> how are you"), ids("fine </s>"), ids("one </s>")]
    assert loaded.train[1].chosen_text == " two"
    rows.append({"prompt": "hello", "chosen": "there two", "rejected": "hello three"})
    assert refused(load_fixed, "pairs", rows) == [
        "data.jsonl, line 3: column 'chosen' doesn't begin with the prompt, as this file's other rows do"
    ]


def test_one_response_that_begins_like_its_prompt_keeps_its_beginning(load_fixed: Any, ids: Any) -> None:
    rows = [
        {"prompt": "how", "chosen": "how are you", "rejected": "how one"},
        {"prompt": "hello", "chosen": "two", "rejected": "three"},
    ]
    assert parts(load_fixed("pairs", rows).train[0])[1] == ids("how are you </s>")


# -- implicit prompts -------------------------------------------------------------------------------------------------


def test_hh_text_parts_at_the_last_common_answer(load_fixed: Any) -> None:
    before = "\n\nHuman: hello\n\nAssistant: fine\n\nHuman: how are you\n\nAssistant:"
    (pair,) = load_fixed("pairs", [{"chosen": before + " thanks one", "rejected": before + " thanks two"}]).train
    # the responses have a common beginning too, which is theirs
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == (before, " thanks one", " thanks two")


def test_conversations_part_at_the_last_message(load_fixed: Any) -> None:
    before = [USER, ONE, {"role": "user", "content": "hello"}]
    (pair,) = load_fixed("pairs", [{"chosen": [*before, FINE], "rejected": [*before, ONE]}]).train
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == ("hello", "fine thanks", "one")


def test_what_has_no_common_beginning_is_refused(load_fixed: Any) -> None:
    rows = [
        {"chosen": "\n\nHuman: hello\n\nAssistant: one", "rejected": "\n\nHuman: how\n\nAssistant: two"},
        {"chosen": "one", "rejected": "two"},
        {"chosen": [USER, ONE, USER, FINE], "rejected": [USER, FINE, USER, ONE]},
        {"chosen": [FINE], "rejected": [ONE]},
        {"chosen": [USER, FINE], "rejected": "one"},
        {"prompt": [USER], "chosen": [{"role": "user", "content": "hello"}, FINE], "rejected": [ONE]},
    ]
    no = "there is no column 'prompt', and chosen and rejected have no"
    assert refused(load_fixed, "pairs", rows) == [
        f"data.jsonl, line 1: {no} common beginning up to '\\n\\nAssistant:'",
        f"data.jsonl, line 2: {no} common beginning up to '\\n\\nAssistant:'",
        "data.jsonl, line 3: chosen (4 messages) and rejected (4) part at message 2; they must be the same but for the "
        "last one",
        f"data.jsonl, line 4: {no} prompt before them",
        "data.jsonl, line 5: chosen and rejected must both be strings or both be lists of messages",
        "data.jsonl, line 6: column 'chosen' has messages before the last one which aren't the prompt's",
    ]


# -- what is wrong with a row -----------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(load_fixed: Any) -> None:
    good = {"prompt": "hello", "chosen": "one", "rejected": "two"}
    content = "".join(
        line + "\n"
        for line in [
            json.dumps({**good, "chosen": ""}),
            json.dumps({**good, "chosen": 3, "rejected": None}),
            json.dumps({**good, "chosen": "two "}),
            json.dumps({**good, "prompt": " "}),
            json.dumps({"prompt": "hello", "chosen": "one"}),
            '{"prompt": "hello"',
            json.dumps({**good, "margin": -1}),
            json.dumps({**good, "margin": math.inf}),
            json.dumps({**good, "margin": "much"}),
            json.dumps({**good, "chosen": [USER]}),
            json.dumps({**good, "chosen": [{"role": "bot", "content": "one"}]}),
        ]
    )
    assert refused(load_fixed, "pairs", content) == [
        "data.jsonl, line 1: column 'chosen' is empty",
        "data.jsonl, line 2: column 'chosen' is a number (3), not a string",
        "data.jsonl, line 2: column 'rejected' is null, not a string",
        'data.jsonl, line 3: chosen and rejected are the same: a string ("two ")',
        "data.jsonl, line 4: the prompt is only white space",
        "data.jsonl, line 5: there is no column 'rejected'; the columns are ['prompt', 'chosen']",
        "data.jsonl, line 6: malformed JSON: Expecting ',' delimiter at column 19, found the end",
        "data.jsonl, line 7: column 'margin' is -1; legal: a finite number, 0 or more",
        "data.jsonl, line 8: column 'margin' is inf; legal: a finite number, 0 or more",
        "data.jsonl, line 9: column 'margin' is a string (\"much\"), not a number",
        "data.jsonl, line 10: column 'chosen': the last message is from the user; it must be from the assistant",
        "data.jsonl, line 11: message 1 has the role 'bot'; legal are system, user, assistant",
    ]


def test_keys_that_do_not_fit_are_told_with_their_names(load_fixed: Any) -> None:
    rows = [{"prompt": "hello", "choosen": "one", "rejected": "two"}]
    assert refused(load_fixed, "pairs", rows, max_prompt_tokens=8, max_tokens=8) == [
        "data.max_prompt_tokens = 8 leaves no room for a response within data.max_tokens = 8; legal: less than that",
        "data.jsonl: there is no column 'chosen' (data.chosen_column); the columns are ['prompt', 'choosen', "
        "'rejected']; the nearest is 'choosen'",
    ]
    assert refused(load_fixed, "pairs", train=[{"path": "a.jsonl", "split": "test", "chosen_column": "rejected"}]) == [
        "data.train.0.split = 'test' is for Hugging Face datasets, and 'a.jsonl' is a file: leave it out",
        "data.train.0.rejected_column and data.train.0.chosen_column are both 'rejected'",
        "a.jsonl: there is no such file (data.train.0)",
    ]
    good = [{"prompt": "hello", "chosen": "one", "rejected": "two"}]
    assert "no prompt is a conversation" in refused(load_fixed, "pairs", good, system_prompt="be kind")[0]


def test_a_tokenizer_without_an_eos_is_refused(load_fixed: Any, word_tokenizer: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    rows = [{"prompt": "hello", "chosen": "one", "rejected": "two"}]
    assert refused(load_fixed, "pairs", rows, tokenizer=tokenizer) == [
        "data.jsonl: the tokenizer has no EOS token to end a response with"
    ]


# -- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_other_kinds_of_files_give_the_same(load_fixed: Any, tmp_path: Any, suffix: str) -> None:
    rows = [
        {"prompt": "hello", "chosen": "one", "rejected": "2", "margin": 0.5},
        {"prompt": "how", "chosen": "1", "rejected": "four", "margin": None},
    ]
    path = tmp_path / f"other{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text("prompt,chosen,rejected,margin\nhello,one,2,0.5\nhow,1,four,\n")
    else:
        path.write_text(json.dumps(rows, indent=1))
    other, lines = load_fixed("pairs", train=str(path)), load_fixed("pairs", rows)
    assert [parts(pair) for pair in other.train] == [parts(pair) for pair in lines.train]
    assert [pair.margin for pair in other.train] == [0.5, None]
    assert other.fingerprint == lines.fingerprint


# -- lengths ----------------------------------------------------------------------------------------------------------


LONG = [
    {"prompt": "one two three four", "chosen": "one", "rejected": "two"},
    {"prompt": "hello", "chosen": "one two three four five", "rejected": "two"},
    {"prompt": "hello", "chosen": "one two three four five one", "rejected": "one two three four five"},
    {"prompt": "hello", "chosen": "one", "rejected": "two"},
]
KEYS = {"max_prompt_tokens": 4, "max_tokens": 7}


def test_overlong_pairs_are_dropped_whole(load_fixed: Any, ids: Any) -> None:
    loaded = load_fixed("pairs", LONG, **KEYS)
    assert [parts(pair) for pair in loaded.train] == [[ids("<s> hello"), ids("one </s>"), ids("two </s>")]]
    assert loaded.report.lines()[0].endswith(
        "4 pairs; the longest has 9 tokens (line 3); 3 longer than 7 tokens, or 4 of the prompt, dropped"
    )
    assert loaded.report.lines()[1] == "1 pair to train on, 0 held out"


def test_overlong_pairs_are_cut_and_those_that_are_then_alike_left_out(load_fixed: Any, ids: Any) -> None:
    loaded = load_fixed("pairs", LONG, overlong="truncate", **KEYS)
    assert [parts(pair) for pair in loaded.train] == [
        # the BOS stays
        [ids("<s> two three four"), ids("one </s>"), ids("two </s>")],
        [ids("<s> hello"), ids("one two three four five"), ids("two </s>")],
        [ids("<s> hello"), ids("one </s>"), ids("two </s>")],
    ]
    assert loaded.report.sources[0].truncated == 3 and loaded.report.sources[0].same_tokens == 1
    assert "1 pair left out, whose responses have the same tokens" in loaded.report.lines()[0]


def test_overlong_pairs_refuse_the_run(load_fixed: Any) -> None:
    assert refused(load_fixed, "pairs", LONG, overlong="refuse", **KEYS) == [
        "data.jsonl, line 1: the prompt has 5 tokens, more than data.max_prompt_tokens = 4",
        "data.jsonl, line 2: prompt and response have 8 tokens, more than data.max_tokens = 7",
        "data.jsonl, line 3: prompt and response have 9 tokens, more than data.max_tokens = 7",
    ]


def test_a_source_of_which_nothing_is_left_is_refused(load_fixed: Any) -> None:
    assert refused(load_fixed, "pairs", LONG[:3], **KEYS) == [
        "data.jsonl: none of its 3 pairs is left: 3 are longer than data.max_prompt_tokens = 4 or data.max_tokens = 7"
    ]
