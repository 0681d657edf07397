"""Completions, conversations and labelled completions, against tokens and masks written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.errors import InputRefused

TALK = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine thanks"},
]


def learnt(example: Any) -> list[int]:
    assert example.mask.dtype == torch.bool and example.tokens.dtype == torch.int64
    return example.tokens[example.mask].tolist()


def refused(load_fixed: Any, *args: Any, **keys: Any) -> list[str]:
    with pytest.raises(InputRefused) as error:
        load_fixed(*args, **keys)
    return [problem.rsplit("/", 1)[-1] for problem in error.value.problems]


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


def test_completions_are_learnt_with_their_eos_and_prompts_are_not(load_fixed: Any, ids: Any) -> None:
    (example,) = load_fixed("examples", [{"prompt": "how are you", "completion": "fine thanks", "who": "me"}]).train
    assert example.tokens.tolist() == ids("<s> how are you fine thanks </s>")
    assert example.mask.tolist() == [False] * 4 + [True] * 3
    assert (example.prompt_text, example.completion_text) == ("how are you", "fine thanks")
    assert example.row == {"who": "me"} and example.desirable is None and example.where.endswith("line 1")


def test_all_tokens_but_the_first_are_learnt_by_choice(load_fixed: Any) -> None:
    rows = [{"prompt": "how are you", "completion": "fine"}, {"messages": TALK}]
    for example in load_fixed("examples", rows, loss_on="all").train:
        assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_of_a_conversation_every_answer_is_learnt_with_its_end_of_turn(load_fixed: Any, ids: Any, words: Any) -> None:
    system = {"role": "system", "content": "be kind"}
    (example,) = load_fixed("examples", [{"messages": [system, *TALK]}]).train
    assert example.tokens.tolist() == ids(
        "<s> [system] be kind [end] [user] hello there [end] [assistant] hello [end] "
        "[user] how are you [end] [assistant] fine thanks [end]"
    )
    assert learnt(example) == ids("hello [end] fine thanks [end]")
    assert example.tokens.tolist() == words.apply_chat_template([system, *TALK], return_dict=False)
    assert (example.prompt_text, example.completion_text) == ("hello there", "hello")


def test_messages_and_prompts_may_stand_in_one_file(load_fixed: Any, ids: Any) -> None:
    rows = [
        {"messages": TALK[:2]},
        {"prompt": TALK[:1], "completion": TALK[1:2]},
        {"prompt": "hello there", "completion": [TALK[1]]},
        {"messages": None, "prompt": TALK[:1], "completion": "hello"},
    ]
    first, *others = load_fixed("examples", rows).train
    assert all(torch.equal(e.tokens, first.tokens) and torch.equal(e.mask, first.mask) for e in others)
    assert learnt(first) == ids("hello [end]")


def test_text_that_stands_in_question_and_answer_is_found_in_the_answer(load_fixed: Any, ids: Any) -> None:
    parrot = [{"role": role, "content": "hello"} for role in ("user", "assistant") * 3]
    (example,) = load_fixed("examples", [{"messages": parrot}]).train
    turn = "[user] hello [end] [assistant] hello [end] "
    assert example.tokens.tolist() == ids("<s> " + turn * 3)
    assert example.mask.tolist() == [False] + ([False] * 4 + [True] * 2) * 3


def test_a_template_without_an_end_of_turn_gives_the_eos_to_the_last_answer(
    load_fixed: Any, ids: Any, word_tokenizer: Any
) -> None:
    plain = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (example,) = load_fixed("examples", [{"messages": TALK}], tokenizer=plain).train
    assert example.tokens.tolist() == ids(
        "[user] hello there [assistant] hello [user] how are you [assistant] fine thanks </s>"
    )
    # the header of the next turn isn't the end of this one
    assert learnt(example) == ids("hello fine thanks </s>")


def test_a_template_that_opens_answers_otherwise_than_it_writes_past_ones(
    load_fixed: Any, ids: Any, word_tokenizer: Any
) -> None:
    thinking = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {% if loop.last and m.role == 'assistant' %}be {% endif %}"
        "{{ m.content }} [end] {% endfor %}{% if add_generation_prompt %}[assistant] be {% endif %}"
    )
    (example,) = load_fixed("examples", [{"messages": TALK}], tokenizer=thinking).train
    assert example.tokens.tolist() == ids(
        "[user] hello there [end] [assistant] hello [end] [user] how are you [end] [assistant] be fine thanks [end]"
    )
    assert learnt(example) == ids("hello [end] fine thanks [end]")


def test_conversations_that_cannot_be_learnt_are_refused(load_fixed: Any, word_tokenizer: Any) -> None:
    user, answer = TALK[0], TALK[1]
    rows = [
        {"messages": [user]},
        {"messages": [user, answer, user]},
        {"messages": [answer, user, answer]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": "hello"},
        {"messages": []},
        {"messages": [user, {"role": "assistant"}]},
    ]
    assert refused(load_fixed, "examples", rows) == [
        "data.jsonl, line 1: the conversation (user) has no assistant's message to learn",
        "data.jsonl, line 2: the last message is from the user; it must be from the assistant",
        "data.jsonl, line 3: the first assistant's message has no user's before it",
        "data.jsonl, line 4: message 2, the assistant's, is empty",
        "data.jsonl, line 5: column 'messages' is a string (\"hello\"), not a list of messages",
        "data.jsonl, line 6: column 'messages' is an empty list of messages",
        "data.jsonl, line 7: message 2 has no 'content'; it has ['role']",
    ]
    never = refused(load_fixed, "examples", [{"messages": TALK}], chat_template="never")
    assert "never takes strings only" in never[0]
    shouting = word_tokenizer(template="{% for m in messages %}[{{ m.role }}] {{ m.content | upper }} {% endfor %}")
    assert refused(load_fixed, "examples", [{"messages": TALK}], tokenizer=shouting) == [
        "data.jsonl, line 1: the chat template can't write the response: it doesn't write message 2 as it stands"
    ]


def test_overlong_examples_are_cut_at_their_end_and_lose_the_eos(load_fixed: Any, ids: Any) -> None:
    rows = [{"prompt": "one two three four", "completion": "one two three"}, {"messages": TALK}]
    cut = load_fixed("examples", rows, overlong="truncate", max_prompt_tokens=4, max_tokens=6).train
    assert cut[0].tokens.tolist() == ids("<s> two three four one two")
    assert cut[0].mask.tolist() == [False] * 4 + [True] * 2
    assert cut[1].tokens.tolist() == ids("<s> there [end] [assistant] hello [end]")
    assert learnt(cut[1]) == ids("hello [end]")
    with pytest.raises(InputRefused, match="none of its 2 examples is left"):
        load_fixed("examples", rows, max_prompt_tokens=4, max_tokens=6)


# -- unpaired preferences ---------------------------------------------------------------------------------------------


def test_labels_are_booleans(load_fixed: Any, ids: Any) -> None:
    rows = [
        {"prompt": "hello", "completion": "one", "label": True},
        {"prompt": "how", "completion": "two three", "label": False},
    ]
    loaded = load_fixed("labelled", rows)
    assert [example.desirable for example in loaded.train] == [True, False]
    assert loaded.train[1].tokens.tolist() == ids("<s> how two three </s>")
    csv = "prompt,completion,label\nhello,one,true\nhow,two three,false\n"
    assert load_fixed("labelled", csv, name="data.csv").fingerprint == loaded.fingerprint
    rows += [{**rows[0], "label": 1}, {**rows[0], "label": None}, {**rows[0], "label": "yes", "completion": ""}]
    assert refused(load_fixed, "labelled", rows) == [
        "data.jsonl, line 3: column 'label' is a number (1), not a boolean (legal: true, false)",
        "data.jsonl, line 4: column 'label' is null, not a boolean (legal: true, false)",
        "data.jsonl, line 5: column 'label' is a string (\"yes\"), not a boolean (legal: true, false)",
        "data.jsonl, line 5: column 'completion' is empty",
    ]
