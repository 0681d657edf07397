"""``rayrlhf critique``: a model that criticises and revises, and the pairs that come of it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from rayrlhf.batch import Batch
from rayrlhf.cluster import Groups
from rayrlhf.config import CritiqueConfig, load_config
from rayrlhf.data.principles import CRITIQUE_PROMPT, REVISE_PROMPT, filled, parse_critique, read_principles
from rayrlhf.drivers import critique
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT
from tests.drivers.runs import TinyWorld

BASE = """
algorithm: critique
seed: 3
policy: {dtype: float32}
rollout: {engine: transformers, max_response_tokens: 40}
critique: {max_critique_tokens: 30, max_input_tokens: 900}
cluster: {executor: inline, threads: 1}
"""
PRINCIPLES = [{"name": "kind", "text": "Be kind."}, {"name": "brief", "text": "Be brief: say {prompt} once."}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Says = Callable[[str, int], str]


# -- what an answer says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("It is rude. [[REVISE]]", "revise"),
        ("It is fine.\n[[KEEP]]\n", "keep"),
        ("[[ revise ]]  \n ", "revise"),
        ("One could [[REVISE]] it, but it is fine.\n[[KEEP]]", "keep"),
        ("[[KEEP]] [[KEEP]]", "keep"),
        ("It is fine.", None),
        ("", None),
        ("[[REVISE]] is what I would say", None),
        ("[[REVISE]].", None),
        ("[REVISE]", None),
        ("REVISE", None),
        ("[[REWRITE]]", None),
        ("[[REVISE]][[KEEP]]", None),
        ("[[KEEP]]\n\n[[REVISE]]", None),
        ("[[REVISE]] or [[KEEP]]", None),
    ],
)
def test_a_critique_ends_in_one_verdict(text: str, verdict: str | None) -> None:
    assert parse_critique(text) == verdict


def test_places_are_filled_in_one_pass() -> None:
    texts = {"prompt": "say {response}", "response": "{principle}{prompt}", "principle": "p"}
    assert filled("a {prompt} b {response} {other}", texts) == "a say {response} b {principle}{prompt} {other}"


def test_every_problem_of_the_principles_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "- {name: kind, text: Be kind.}\n- name: brief\n- just a text\n- name: kind\n  text: Again.\n"
        "- name: null\n  txt: Hm.\n  text: ' '\n- name: 7\n  text: A number is a name too.\n  name: 8\n"
    )
    with pytest.raises(InputRefused) as refused:
        read_principles(str(file))
    lines = [problem.removeprefix(f"{file}:").split(": ", 1) for problem in refused.value.problems]
    found = [(int(line), next(w for w in WORDS if w in text)) for line, text in lines]
    assert found == [(2, "has no text"), (3, "is no section"), (4, "stands at"), (6, "isn't empty"), (7, "nearest is 'text'"),
                     (8, "isn't empty"), (11, "stands twice")]  # fmt: skip
    for text, word in (
        ("", "no principles"),
        ("a: b", "found a section"),
        ("- [", "isn't YAML"),
        ("3", "the text '3'"),
    ):
        file.write_text(text)
        with pytest.raises(InputRefused, match=word):
            read_principles(str(file))
    file.write_bytes(b"- name: a\n  text: \xff\n")
    with pytest.raises(InputRefused, match=r"p\.yaml:2: byte 0xff"):
        read_principles(str(file))
    file.write_text(yaml.safe_dump(PRINCIPLES))
    assert [(p.name, p.text) for p in read_principles(str(file))] == [(p["name"], p["text"]) for p in PRINCIPLES]


WORDS = ("has no text", "is no section", "stands at", "isn't empty", "nearest is 'text'", "stands twice")


# -- a model that says what it is told --------------------------------------------------------------------------


class Scripted:
    """Stands for the rollout group: it answers a text by a text, one token a byte."""

    size = 1

    def __init__(self, tokenizer: Any, says: Says):
        self.tokenizer, self.says = tokenizer, says
        self.asked: list[tuple[str, int]] = []
        self.seeds: list[int] = []

    def stream(self, method: str, batches: Sequence[Batch], *, max_response_tokens: int) -> Iterator[Batch]:
        assert method == "generate" and len(batches) == 1
        batch = batches[0]
        self.seeds += batch["seed"].tolist()
        for k in reversed(range(len(batch))):  # samples finish in another order than they were given in
            one = batch.select([k])
            text = self.tokenizer.decode(one["tokens"].tolist())
            self.asked.append((text, max_response_tokens))
            answer = self.tokenizer(self.says(text, max_response_tokens), add_special_tokens=False)["input_ids"]
            cut = len(answer) >= max_response_tokens
            tokens = torch.cat([one["tokens"], torch.tensor([*answer, 2][:max_response_tokens], dtype=torch.int64)])
            sample = {n: c for n, c in one.columns()[1].items() if n in ("position", "prompt_id")}
            sample |= {"prompt_length": one.lengths, "finish_reason": ["length" if cut else "stop"]}
            yield Batch.from_samples({"tokens": [tokens]}, sample)


@pytest.fixture(scope="module")
def spelling(world: TinyWorld) -> Path:
    """A model's folder with one token for each byte; no weight of it is ever loaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelled = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    spelled.pre_tokenizer, spelled.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = world.folder / "spelling"
    PreTrainedTokenizerFast(
        tokenizer_object=spelled, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    LlamaConfig(vocab_size=len(letters), eos_token_id=2, max_position_embeddings=2048).save_pretrained(folder)
    return folder


class Done:
    """What a run left, said and asked."""

    def __init__(self, folder: Path, summary: dict, printed: str, group: Scripted | None = None):
        self.folder, self.summary, self.printed, self.group = folder, summary, printed, group
        self.pairs, self.critiques = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                                      for name in ("data.jsonl", "critiques.jsonl"))  # fmt: skip

    def outcomes(self, principle: str) -> dict[str, int]:
        return {name: count for name, count in self.summary["principles"][principle].items() if count}


def configured(folder: Path, model: Path, name: str, rows: list[dict], *overrides: str) -> CritiqueConfig:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "principles.yaml").write_text(yaml.safe_dump(PRINCIPLES))
    values = yaml.safe_load(BASE) | {"run_dir": str(folder / name), "data": {"prompts": str(folder / f"{name}.jsonl")}}
    values["policy"]["path"] = str(model)
    values["critique"]["principles"] = str(folder / "principles.yaml")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(file, list(overrides))  # type: ignore[return-value]


def run(config: CritiqueConfig, monkeypatch: Any = None, says: Says | None = None) -> Done:
    group = None
    if says is not None:
        from transformers import AutoTokenizer

        group = Scripted(AutoTokenizer.from_pretrained(config.policy.path), says)

        @contextmanager
        def scripted(config: Any, specs: Any, warn: Any) -> Iterator[Groups]:
            assert [spec.name for spec in specs] == ["rollout"]
            yield Groups({"rollout": group})

        monkeypatch.setattr(critique, "started", scripted)
    console = Console(file=io.StringIO(), width=160)
    summary = critique.critique_responses(config, console)
    return Done(Path(config.run_dir), summary, console.file.getvalue(), group)  # type: ignore[attr-defined]


def part(text: str, name: str) -> str:
    """What stands in a built-in prompt between its marks."""
    return re.search(rf"\[{name}\]\n(.*?)\n\[End of {name.lower()}\]", text, re.DOTALL)[1]  # type: ignore[index]


def principle_of(text: str) -> str:
    return "kind" if "Principle: Be kind." in text else "brief"


ROWS = [
    {"prompt": "Q1 ", "answer": " rude and long"},  # revised twice
    {"prompt": "Q2 ", "answer": "rude and short"},  # revised once
    {"prompt": "Q3 ", "answer": "kind and short"},  # kept
    {"prompt": "Q4 ", "answer": "unsure"},  # neither verdict, then both
    {"prompt": "Q5 ", "answer": "stubborn"},  # the revision says the same, then nothing
    {"prompt": "Q6 ", "answer": "turncoat"},  # the second revision is the original again
    {"prompt": "Q7 ", "answer": "x" * 1500},  # too long to criticise
    {"prompt": "Q8 ", "answer": "long " * 70},  # its critique is long too: too long to revise
]


def scripted_answer(text: str, most: int) -> str:
    response, principle = part(text, "Response"), principle_of(text)
    if "[Critique]" not in text:
        if response == "unsure":
            return "Well." if principle == "kind" else "[[KEEP]] [[REVISE]]"
        if response.startswith("long long"):
            return "It repeats. " * 14 + "[[REVISE]]" if principle == "kind" else "[[KEEP]]"
        wrong = {"kind": ("rude", "stubborn", "turncoat"), "brief": ("long", "stubborn", "other")}[principle]
        return "Against it. [[REVISE]]" if any(word in response for word in wrong) else "Fine. [[KEEP]]"
    assert part(text, "Critique") == "Against it. [[REVISE]]"
    if response == "stubborn":
        return " stubborn " if principle == "kind" else "  "
    if "coat" in response or response == "other":
        return "other" if principle == "kind" else "turncoat"
    return (
        response.replace("rude", "kind").strip() if principle == "kind" else response.replace("long", "short").strip()
    )


@pytest.fixture(scope="module")
def scripted(world: TinyWorld, spelling: Path) -> Done:
    settings = ["data.response_column=answer", "critique.max_critique_tokens=200"]
    with pytest.MonkeyPatch.context() as patch:
        return run(configured(world.folder, spelling, "scripted", ROWS, *settings), patch, scripted_answer)


def test_pairs_are_the_last_revision_over_the_original(scripted: Done) -> None:
    assert scripted.pairs == [
        {"prompt": "Q1 ", "chosen": " kind and short", "rejected": " rude and long"},
        {"prompt": "Q2 ", "chosen": "kind and short", "rejected": "rude and short"},
        {"prompt": "Q6 ", "chosen": "other", "rejected": "turncoat"},
    ]
    assert scripted.summary["written"] == 3 and scripted.summary["prompts"] == 8
    assert sorted(p.name for p in scripted.folder.iterdir()) == [
        *["config.yaml", "critiques.jsonl", "data.jsonl", "log.txt", "summary.json"]
    ]
    assert json.loads((scripted.folder / "summary.json").read_text()) == scripted.summary


def test_every_outcome_is_counted_by_principle(scripted: Done) -> None:
    assert scripted.outcomes("kind") == {
        **{"revised": 3, "kept": 1, "unparsable": 1, "unchanged": 1, "too_long": 2},
    }
    assert scripted.outcomes("brief") == {
        **{"revised": 1, "kept": 3, "unparsable": 1, "unchanged": 1, "empty": 1, "too_long": 1},
    }
    by_place = {(row["prompt"], row["principle"]): row for row in scripted.critiques}
    assert len(by_place) == len(scripted.critiques) == 16
    assert [row["outcome"] for row in scripted.critiques[:8]] == [
        *["revised", "revised", "kept", "unparsable", "unchanged", "revised", "too_long", "too_long"]
    ]
    first, second = by_place["Q1 ", "kind"], by_place["Q1 ", "brief"]
    assert first["response"] == " rude and long" and first["revision"] == "kind and long"
    assert second["response"] == " kind and long" and second["critique"] == "Against it. [[REVISE]]"
    assert by_place["Q4 ", "brief"]["critique"] == "[[KEEP]] [[REVISE]]"
    assert by_place["Q7 ", "kind"]["critique"] is None and by_place["Q8 ", "kind"]["critique"].endswith("[[REVISE]]")
    assert by_place["Q8 ", "kind"]["revision"] is None and by_place["Q1 ", "kind"]["where"].endswith("line 1")
    shown = " ".join(scripted.printed.split())
    assert "3 pairs from 8 prompts" in shown and "Unparsable: 2 critiques" in shown


def test_questions_are_the_built_in_prompts_filled_in(scripted: Done) -> None:
    assert scripted.group is not None
    texts = {"prompt": "Q1 ", "response": " rude and long", "principle": "Be kind."}
    asked = [text for text, _ in scripted.group.asked]
    assert filled(CRITIQUE_PROMPT, texts) in asked
    assert filled(REVISE_PROMPT, {**texts, "critique": "Against it. [[REVISE]]"}) in asked
    # a principle that holds a place's name keeps it
    assert any("Be brief: say {prompt} once." in text for text in asked)
    assert {most for text, most in scripted.group.asked if "[Critique]" in text} == {40}
    assert {most for text, most in scripted.group.asked if "[Critique]" not in text} == {200}
    assert len(set(scripted.group.seeds)) == len(scripted.group.seeds) == len(asked)


def test_conversations_stay_conversations(world: TinyWorld, spelling: Path, monkeypatch: Any) -> None:
    """The template frames the questions; the model's own response is what is criticised."""
    (world.folder / "t.jinja").write_text(TEMPLATE)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "A"},
    ]
    rows = [{"prompt": turns}, {"prompt": [{"role": "user", "content": "B"}]}]

    def says(text: str, most: int) -> str:
        if text == "<user>B</user><assistant>":
            return "  "
        if text == "<user>Hi</user><assistant>Yes?</assistant><user>A</user><assistant>":
            return "first"
        assert text.startswith("<user>Below are") and text.endswith("</user><assistant>")
        assert part(text, "Prompt") == "user: Hi\n\nassistant: Yes?\n\nuser: A"
        return "y" * 50 if "[Critique]" in text else "[[REVISE]]" if principle_of(text) == "kind" else "[[KEEP]]"

    settings = [f"policy.chat_template={world.folder / 't.jinja'}"]
    done = run(configured(world.folder, spelling, "chats", rows, *settings), monkeypatch, says)
    assert done.pairs == [{"prompt": turns, "chosen": "y" * 40, "rejected": "first"}]
    assert done.summary["empty_responses"] == 1 and done.summary["revisions_cut"] == 1
    assert "1 prompts, as the response has no text" in done.printed and len(done.critiques) == 2


def test_own_prompts_and_no_template(world: TinyWorld, spelling: Path, monkeypatch: Any) -> None:
    """With data.chat_template never, the template that the tokenizer brings frames nothing."""
    shutil.copytree(spelling, world.folder / "chatty")
    (world.folder / "chatty" / "chat_template.jinja").write_text(TEMPLATE)
    (world.folder / "ask.txt").write_text("{prompt}|{response}|{principle}: [[REVISE]] or [[KEEP]]?")
    (world.folder / "mend.txt").write_text("{critique}+{prompt}|{response}|{principle}")
    settings = [f"critique.{key}={world.folder / file}" for key, file in
                (("critique_prompt", "ask.txt"), ("revise_prompt", "mend.txt"))]  # fmt: skip
    settings += ["data.chat_template=never", "data.response_column=answer"]
    said = {
        "Q|A|Be kind.: [[REVISE]] or [[KEEP]]?": "no {prompt} [[REVISE]]",
        "no {prompt} [[REVISE]]+Q|A|Be kind.": "B",
        "Q|B|Be brief: say {prompt} once.: [[REVISE]] or [[KEEP]]?": "[[KEEP]]",
    }
    config = configured(world.folder, world.folder / "chatty", "own", [{"prompt": "Q", "answer": "A"}], *settings)
    done = run(config, monkeypatch, lambda text, most: said[text])
    assert done.pairs == [{"prompt": "Q", "chosen": "B", "rejected": "A"}]


def test_the_white_space_of_a_pair_is_alike(world: TinyWorld, spelling: Path, monkeypatch: Any) -> None:
    """A revision joins its prompt as the original does, and neither ends in white space."""
    cases = {  # prompt and original, what the model says, the pair
        ("a", " b\n"): ("\nc \n", " c", " b"),
        ("d", ", e"): (" f", " f", ", e"),
        ("g ", "h"): (" i", "i", "h"),
        ("j", ", k"): (", l", ", l", ", k"),
    }
    said = {original.rstrip(): answer for (_, original), (answer, _, _) in cases.items()}

    def says(text: str, most: int) -> str:
        if "[Critique]" in text:
            return said[part(text, "Response")]
        return "[[REVISE]]" if principle_of(text) == "kind" else "[[KEEP]]"

    rows = [{"prompt": prompt, "answer": original} for prompt, original in cases]
    config = configured(world.folder, spelling, "white", rows, "data.response_column=answer")
    done = run(config, monkeypatch, says)
    assert [(p["chosen"], p["rejected"]) for p in done.pairs] == [expected[1:] for expected in cases.values()]


SMALL = ("critique.max_input_tokens=200", "data.max_prompt_tokens=8")
"""The tiny model reads 256 tokens."""


# -- a real model -----------------------------------------------------------------------------------------------


def test_a_real_model_that_gives_no_verdict(world: TinyWorld) -> None:
    """The tiny model knows neither word: all its critiques are unparsable, and none is guessed."""
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(5)]
    settings = ["rollout.max_response_tokens=8", "critique.max_critique_tokens=8", *SMALL]
    done = run(configured(world.folder, world.folder / "model", "real", rows, *settings))
    left = 5 - done.summary["empty_responses"]
    assert done.pairs == [] and done.summary["written"] == 0 and left > 2
    assert done.outcomes("kind") == done.outcomes("brief") == {"unparsable": left}
    assert "0 pairs from 5 prompts" in done.printed
    answers = [row["critique"] for row in done.critiques]
    assert len(set(answers)) > left and all(re.fullmatch(r"(w\d+ ?)*", answer) for answer in answers)
    again = run(configured(world.folder, world.folder / "model", "again", rows, *settings, "rollout.max_num_seqs=2"))
    assert [row["critique"] for row in again.critiques] == answers
    other = run(configured(world.folder, world.folder / "model", "reseeded", rows, *settings, "seed=4"))
    assert [row["critique"] for row in other.critiques] != answers


# -- refusals, and the command ----------------------------------------------------------------------------------


def test_what_is_refused_is_told_together(world: TinyWorld, spelling: Path) -> None:
    (world.folder / "half.txt").write_text("{prompt} {response} [[KEEP]]")
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": " "}, {"prompt": "d"}]
    config = configured(
        *(world.folder, spelling, "wrong", rows, "data.response_column=answer"),
        *(f"critique.critique_prompt={world.folder / 'half.txt'}", "critique.revise_prompt=no.txt"),
        *("critique.principles=none.yaml", "critique.max_input_tokens=2040", "critique.max_critique_tokens=8"),
    )
    with pytest.raises(InputRefused) as refused:
        critique.critique_responses(config, Console(file=io.StringIO()))
    words = ["none.yaml can't be read", "lacks {principle}, [[REVISE]];", "no.txt can't be read", "reads at most 2048",
             "line 2: column 'answer' is only white space", "line 3: column 'answer' is null"]  # fmt: skip
    assert len(refused.value.problems) == len(words)
    for word, problem in zip(words, refused.value.problems, strict=True):
        assert word in problem
    assert not (world.folder / "wrong").exists()
    config = configured(world.folder, spelling, "wrong", rows[:1], "data.response_column=reply")
    with pytest.raises(InputRefused, match=r"no column 'reply'.*\['answer'\]"):
        critique.critique_responses(config, Console(file=io.StringIO()))


def test_the_command(world: TinyWorld) -> None:
    settings = ["rollout.max_response_tokens=4", "critique.max_critique_tokens=4", *SMALL]
    configured(world.folder, world.folder / "model", "typed-critique", [{"prompt": "w1 w2"}])
    line = [sys.executable, "-m", "rayrlhf.cli", "critique", str(world.folder / "typed-critique.yaml"), *settings]
    first = subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert first.returncode == 0 and "0 pairs from 1 prompts" in " ".join(first.stdout.split()), first.stderr
    with pytest.raises(InputRefused, match="holds a run already"):
        critique.critique_responses(load_config(world.folder / "typed-critique.yaml", settings))
