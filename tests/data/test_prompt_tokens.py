"""Tokens of prompts and completions, against texts and tokens written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.errors import InputRefused

CHAT = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "how are you"},
]


def tokens(loaded: Any) -> list[list[int]]:
    return [prompt.tokens.tolist() for prompt in loaded.train]


def refused(load: Any, *args: Any, **keys: Any) -> list[str]:
    with pytest.raises(InputRefused) as error:
        load(*args, **keys)
    return [problem.rsplit("/", 1)[-1] for problem in error.value.problems]


# -- templates --------------------------------------------------------------------------------------------------------


def test_conversations_get_the_template_and_strings_do_not(load: Any, ids: Any, words: Any) -> None:
    loaded = load([{"prompt": CHAT}, {"prompt": "hello there"}])
    by_hand = ids("<s> [user] hello there [end] [assistant] hello [end] [user] how are you [end] [assistant]")
    assert tokens(loaded) == [by_hand, ids("<s> hello there")]
    assert [prompt.text for prompt in loaded.train] == ["how are you", "hello there"]
    assert by_hand == words.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert loaded.train[0].tokens.dtype == torch.int64
    assert loaded.report.sources[0].conversations == 1


def test_always_makes_a_string_the_user_s_message(load: Any, ids: Any) -> None:
    loaded = load([{"prompt": "hello there"}], chat_template="always")
    assert tokens(loaded) == [ids("<s> [user] hello there [end] [assistant]")]
    assert loaded.train[0].text == "hello there"


def test_never_takes_strings_only(load: Any, ids: Any) -> None:
    assert tokens(load([{"prompt": "hello"}], chat_template="never")) == [ids("<s> hello")]
    assert refused(load, [{"prompt": "hello"}, {"prompt": CHAT}], chat_template="never") == [
        "prompts.jsonl, line 2: the prompt is a list of messages; data.chat_template = never takes strings only "
        "(legal: auto, always)"
    ]


def test_the_system_prompt_comes_first_where_there_is_none(load: Any, ids: Any) -> None:
    own = [{"role": "system", "content": "fine"}, {"role": "user", "content": "hello"}]
    rows = [{"prompt": own[1:]}, {"prompt": own}, {"prompt": "hello"}]
    loaded = load(rows, system_prompt="be kind")
    assert tokens(loaded) == [
        ids("<s> [system] be kind [end] [user] hello [end] [assistant]"),
        ids("<s> [system] fine [end] [user] hello [end] [assistant]"),
        ids("<s> hello"),
    ]
    (always,) = load([rows[2]], system_prompt="be kind", chat_template="always").train
    assert always.tokens.tolist() == tokens(loaded)[0]


def test_a_system_prompt_without_effect_is_refused(load: Any, word_tokenizer: Any) -> None:
    (found,) = refused(load, [{"prompt": "hello"}], system_prompt="be kind")
    assert found.startswith("data.system_prompt is given, but no prompt is a conversation")
    silent = word_tokenizer(template="{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}")
    assert refused(load, [{"prompt": CHAT}], system_prompt="be kind", tokenizer=silent) == [
        "prompts.jsonl: the chat template leaves system messages out, so data.system_prompt would do nothing"
    ]


def test_a_tokenizer_without_template(load: Any, word_tokenizer: Any) -> None:
    bare = word_tokenizer(template=None)
    (found,) = refused(load, [{"prompt": "hello"}, {"prompt": CHAT}], tokenizer=bare)
    assert found.startswith("prompts.jsonl, line 2), and the tokenizer has none. Give a file with a Jinja template")
    assert found.endswith("policy.chat_template")
    with pytest.raises(InputRefused, match="2 of 2 prompts need a chat template .data.chat_template = always;"):
        load([{"prompt": "hello"}] * 2, tokenizer=bare, chat_template="always")
    assert len(load([{"prompt": "hello"}], tokenizer=bare).train) == 1


def test_what_a_template_refuses_is_told_with_the_line(load: Any, word_tokenizer: Any) -> None:
    strict = word_tokenizer(
        template="{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    rows = [{"prompt": CHAT[:1]}, {"prompt": CHAT}]
    assert refused(load, rows, tokenizer=strict) == [
        "prompts.jsonl, line 2: the chat template refuses it: TemplateError: one message only"
    ]
    broken = word_tokenizer(template="{% if %}")
    (first, second) = refused(load, rows, tokenizer=broken)
    assert first.startswith("prompts.jsonl, line 1: the chat template refuses it: TemplateSyntaxError: ")
    assert second.startswith("prompts.jsonl, line 2: ")


# -- special tokens of plain strings ----------------------------------------------------------------------------------


def test_a_plain_string_gets_one_bos_and_no_eos(load: Any, ids: Any, word_tokenizer: Any) -> None:
    rows = [{"prompt": "hello </s>"}, {"prompt": "<s> hello"}, {"prompt": "one"}]
    expected = [ids("<s> hello </s>"), ids("<s> hello"), ids("<s> one")]
    assert tokens(load(rows)) == expected
    assert tokens(load(rows, tokenizer=word_tokenizer(add_eos=True))) == expected


def test_bytes_and_no_bos(load: Any, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    (prompt,) = load([{"prompt": "hello ü"}], tokenizer=tokenizer).train
    assert len(prompt.tokens) == len("hello ü".encode()) - 1  # "lo" is one token
    assert tokenizer.decode(prompt.tokens) == "hello ü"


def test_a_prompt_without_tokens_is_refused(load: Any, word_tokenizer: Any) -> None:
    from tokenizers import normalizers

    deaf = word_tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Replace("hello", "")
    assert refused(load, [{"prompt": "one"}, {"prompt": "hello"}], tokenizer=deaf) == [
        "prompts.jsonl, line 2: the tokenizer makes no tokens of it"
    ]


# -- lengths ----------------------------------------------------------------------------------------------------------

LONG = [{"prompt": "one"}, {"prompt": "one two three four"}, {"prompt": "one two three"}, {"prompt": "one two"}]
"""Of 2, 5, 4 and 3 tokens, BOS included."""


def test_overlong_prompts_are_dropped(load: Any, ids: Any) -> None:
    loaded = load(LONG, max_prompt_tokens=3)
    assert tokens(loaded) == [ids("<s> one"), ids("<s> one two")]
    assert [prompt.id for prompt in loaded.train] == [0, 1] and loaded.train[1].where.endswith("line 4")
    source = loaded.report.sources[0]
    assert (source.rows, source.dropped, source.truncated, source.usable) == (4, 2, 0, 2)
    assert (source.shortest, source.longest, source.longest_at) == (2, 5, "line 2")
    line = loaded.report.lines()[0].rsplit("/", 1)[-1]
    assert line == "prompts.jsonl: 4 prompts; the longest has 5 tokens (line 2); 2 longer than 3 tokens dropped"


def test_overlong_prompts_are_cut_at_their_beginning_behind_the_bos(load: Any, ids: Any, byte_tokenizer: Any) -> None:
    keys = {"max_prompt_tokens": 3, "overlong_prompts": "truncate_left"}
    loaded = load(LONG, **keys)
    assert tokens(loaded) == [ids("<s> one"), ids("<s> three four"), ids("<s> two three"), ids("<s> one two")]
    assert loaded.train[1].text == "one two three four"
    assert (loaded.report.sources[0].dropped, loaded.report.sources[0].truncated) == (0, 2)
    assert "2 longer than 3 tokens cut at the beginning" in loaded.report.lines()[0]
    assert tokens(load(LONG[:2], **{**keys, "max_prompt_tokens": 1})) == [ids("one"), ids("four")]
    tokenizer = byte_tokenizer()
    (prompt,) = load([{"prompt": "abcdef"}], tokenizer=tokenizer, **keys).train
    assert tokenizer.decode(prompt.tokens) == "def"


def test_overlong_prompts_are_refused_together_with_other_problems(load: Any) -> None:
    assert refused(load, [*LONG, {"prompt": ""}], max_prompt_tokens=3, overlong_prompts="refuse") == [
        "prompts.jsonl, line 2: the prompt has 5 tokens, more than data.max_prompt_tokens = 3 (the longest has 5)",
        "prompts.jsonl, line 3: the prompt has 4 tokens, more than data.max_prompt_tokens = 3 (the longest has 5)",
        "prompts.jsonl, line 5: the prompt is empty",
    ]
    assert len(load(LONG, max_prompt_tokens=5, overlong_prompts="refuse").train) == 4


def test_nothing_left(load: Any) -> None:
    assert refused(load, LONG, max_prompt_tokens=1) == [
        "prompts.jsonl: all 4 prompts were dropped: they have 2 to 5 tokens, more than data.max_prompt_tokens = 1"
    ]


# -- known completions ------------------------------------------------------------------------------------------------


def completion(load: Any, prompt: Any, text: str, **keys: Any) -> list[int]:
    """The completion's tokens of the one held-out prompt; another file is there to be trained on."""
    rows = [{"prompt": prompt, "good": text}]
    loaded = load(rows, completion_column="good", held_out=1, **keys)
    (held,) = loaded.held_out
    assert held.row == {"good": text}
    assert all(other.completion_tokens is None for other in loaded.train)
    return held.completion_tokens.tolist()


@pytest.fixture
def load_held_out(load: Any, write: Any) -> Any:
    train = write([{"prompt": "five"}], "train.jsonl")

    def load_file(rows: Any, **keys: Any) -> Any:
        return load(prompts=train, eval_prompts=write(rows, "held_out.jsonl"), **keys)

    return load_file


def test_completion_of_a_conversation_ends_as_the_template_ends_a_turn(load_held_out: Any, ids: Any) -> None:
    assert completion(load_held_out, CHAT, "fine thanks") == ids("fine thanks [end]")


def test_completion_where_the_template_ends_no_turn_gets_the_eos(
    load_held_out: Any, ids: Any, word_tokenizer: Any
) -> None:
    open_end = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    )
    assert completion(load_held_out, CHAT, "fine", tokenizer=open_end) == ids("fine </s>")
    plain = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert completion(load_held_out, CHAT, "fine", tokenizer=plain) == ids("fine </s>")
    thinking = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}three {% endif %}"
        "{{ m.content }} [end] {% endfor %}{% if add_generation_prompt %}[assistant] one two {% endif %}"
    )
    assert completion(load_held_out, CHAT, "fine", tokenizer=thinking) == ids("fine [end]")
    rewriting = word_tokenizer(
        template="{% for m in messages %}[{{ m.role }}] {{ m.content.split(' ')[-1] }} [end] {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert completion(load_held_out, CHAT, "one fine", tokenizer=rewriting) == ids("one fine </s>")


def test_completion_where_a_template_has_no_header_for_answers(
    load_held_out: Any, ids: Any, word_tokenizer: Any
) -> None:
    instruct = word_tokenizer(
        template="<s>{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }} [end]{% else %}"
        " {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    assert completion(load_held_out, CHAT, "fine", tokenizer=instruct) == ids("fine </s>")


def test_completion_ends_before_the_line_break_behind_the_turn(load_held_out: Any, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(
        template="{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = completion(load_held_out, CHAT, "fine: e", tokenizer=tokenizer)
    assert tokenizer.decode(found) == "fine: e<|end|>"


def test_completion_of_a_plain_prompt_is_its_own_tokens(load_held_out: Any, ids: Any) -> None:
    assert completion(load_held_out, "how are", "you fine") == ids("you fine")


def test_completion_is_what_stands_behind_the_prompt_s_tokens(load_held_out: Any, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    merged = tokenizer("o there").input_ids
    # in one piece "hell" + "o there" has the token "lo", which is in neither the prompt nor the completion
    assert completion(load_held_out, "hell", "o there", tokenizer=tokenizer) == merged
    from tokenizers import pre_tokenizers

    spaced = byte_tokenizer()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    found = completion(load_held_out, "one", "two", tokenizer=spaced)
    assert tokenizer.decode(found) == "two"  # not " two", which the tokenizer makes of "two" alone


def test_completion_columns_are_checked_where_they_are_used(load: Any, write: Any) -> None:
    rows = [{"prompt": "one", "good": "fine"}, {"prompt": "two", "good": None}, {"prompt": "three"}]
    assert refused(load, rows, completion_column="good", held_out=1) == [
        "prompts.jsonl, line 2: column 'good' is null, not a string",
        "prompts.jsonl, line 3: there is no column 'good'; the columns are ['prompt']",
    ]
    assert refused(load, rows, completion_column="god", held_out=1) == [
        "prompts.jsonl: there is no column 'god' (data.completion_column); the columns are ['prompt', 'good']; "
        "the nearest is 'good'"
    ]
    # training prompts need none
    held_out = write([{"prompt": "four", "good": "fine"}], "held_out.jsonl")
    loaded = load(rows, completion_column="good", eval_prompts=held_out, held_out=1)
    assert len(loaded.train) == 3


def test_a_completion_that_the_template_refuses(load_held_out: Any, word_tokenizer: Any) -> None:
    strict = word_tokenizer(
        template="{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputRefused, match="held_out.jsonl, line 1: column 'good' can't be written .* no answers"):
        completion(load_held_out, CHAT[:1], "fine", tokenizer=strict)
