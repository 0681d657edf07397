"""Text to tokens: chat templates, the tokenizer's special tokens, and the cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

from rayrlhf.data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptTokenizer"]


class PromptTokenizer:
    """The tokens of prompts and of known completions.

    A conversation gets exactly what its template writes, so never a second BOS. A plain string gets what the tokenizer
    puts before a text (a BOS, for many), once, and nothing behind it: the policy goes on from there. ``special`` holds
    the special tokens in writing, the longest first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted(special, key=len, reverse=True)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """The conversation in the template's words, with the header of the answer that is to come.

        Raises what the template raises.
        """
        written = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        assert isinstance(written, str)
        return written

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that hold their special tokens already."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of plain texts, with what the tokenizer puts before a text. None at all where the text has none."""
        bare = self.encode_rendered(texts)
        first = next((index for index, tokens in enumerate(bare) if tokens), None)
        if first is None:
            return bare
        prefix = self._prefix(texts[first], bare[first])
        # a text that begins with the BOS in writing has it already
        return [tokens if not tokens or tokens[: len(prefix)] == prefix else prefix + tokens for tokens in bare]

    def _prefix(self, text: str, bare: list[int]) -> list[int]:
        """What the tokenizer puts before a text; ``bare`` are the text's own tokens."""
        full = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ValueError("the tokenizer changes a text's own tokens when it adds special tokens; that can't be used")

    def cut_left(self, tokens: list[int], length: int) -> list[int]:
        """The last ``length`` tokens; a BOS at the beginning stays there, as models lean on it."""
        if len(tokens) <= length:
            return tokens
        if length > 1 and tokens[0] == self.tokenizer.bos_token_id:
            return tokens[:1] + tokens[len(tokens) - length + 1 :]
        return tokens[len(tokens) - length :]

    def completion(self, prompt: str, messages: Sequence[Message] | None, completion: str) -> list[int]:
        """Tokens of a known completion behind a prompt.

        Behind a plain prompt: the completion's own tokens. Behind a conversation: the assistant's message as the
        template writes it, up to and with the end-of-turn token; the tokenizer's EOS where the template writes none.

        Args:
            prompt: the plain text, or the rendered conversation.
            messages: the conversation, or None for a plain prompt.
            completion: the known text.

        Raises what the template raises, and ValueError where an EOS is needed and the tokenizer has none.
        """
        tail = completion if messages is None else self._turn(prompt, messages, completion)
        encode = self.encode_plain if messages is None else self.encode_rendered
        alone, joint = encode([prompt, prompt + tail])
        # in one piece with the prompt, some tokenizers write the text's beginning otherwise than alone
        if joint[: len(alone)] == alone:
            return joint[len(alone) :]
        return self.encode_rendered([tail])[0]

    def response(self, prompt: str, messages: Sequence[Message] | None, text: str) -> str:
        """What follows ``prompt`` where the response is ``text``, to be tokenised alone.

        Behind a plain prompt: the text itself. Behind a conversation: the assistant's message as the template writes
        it, up to and with the end-of-turn token; the tokenizer's EOS where the template writes none.

        Raises what the template raises, and ValueError where an EOS is needed and the tokenizer has none.
        """
        return text if messages is None else self._turn(prompt, messages, text)

    def with_eos(self, tokens: list[int]) -> list[int]:
        """The tokens, ending with the tokenizer's EOS. Raises ValueError where it has none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no EOS token to end a response with")
        return tokens if tokens and tokens[-1] == eos else [*tokens, eos]

    def segments(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """A conversation as the template writes it, in pieces: (text, whether an assistant says it), from the beginning.

        What an assistant says begins behind the header of its turn and ends with the end-of-turn token. The last one
        gets the tokenizer's EOS where the template writes none; nothing follows it.

        Args:
            messages: they end with an assistant's.

        Raises what the template raises, and ValueError where the template doesn't write an assistant's message as it
        stands, or an EOS is needed and the tokenizer has none.
        """
        last = len(messages) - 1
        before = self.render(messages[:last])
        answer = self._turn(before, messages[:last], messages[last]["content"])
        pieces: list[tuple[str, bool]] = []
        position = 0
        for index, message in enumerate(messages[:last]):
            if message["role"] == "assistant":
                start, end = self._past_turn(before, messages, index, position, answer)
                pieces += [(before[position:start], False), (before[start:end], True)]
                position = end
        return [*pieces, (before[position:], False), (answer, True)]

    def _past_turn(
        self, written: str, messages: Sequence[Message], index: int, position: int, answer: str
    ) -> tuple[int, int]:
        """Where the assistant's message ``index`` stands in ``written``, at or behind ``position``.

        ``answer`` is the conversation's last turn: its end shows the end-of-turn token.
        """
        head = self.render(messages[:index])
        same = max(position, _common(written, head))
        content = messages[index]["content"].strip()
        start = written.find(content, same)
        if start < 0:
            raise ValueError(f"it doesn't write message {index + 1} as it stands")
        end = start + len(content)
        behind = written[end:]
        token = next((token for token in self.special if behind.lstrip().startswith(token)), None)
        # a template without an end of turn: what follows is the header of the next one
        if token is not None and answer.endswith(token):
            end += behind.index(token) + len(token)
        # it writes past turns otherwise than it opens a new one (without "<think>", say)
        return (same if same >= len(head) else start), end

    def _turn(self, prompt: str, messages: Sequence[Message], completion: str) -> str:
        """What the template writes behind ``prompt`` for an assistant's message, up to and with the end of the turn."""
        whole = self.render([*messages, {"role": "assistant", "content": completion}], answer=False)
        same = _common(whole, prompt)
        before, text, behind = whole[same:].partition(completion.strip())
        if not text:  # the template writes something else: it is the known text that counts
            before, text, behind = "", completion, ""
        elif same < len(prompt):
            # it opens an answer that is to come otherwise than it writes an old one (with "<think>", say)
            before = ""
        end = next((token for token in self.special if behind.lstrip().startswith(token)), None)
        eos = self.tokenizer.eos_token
        if end is not None and self.render(messages, answer=False) == prompt:
            # this template writes the header of the next answer in any case: what follows the text may be just that
            end = None
        if end is not None:
            return before + text + behind[: behind.index(end) + len(end)]
        if eos is None:
            raise ValueError("neither the chat template nor the tokenizer has an EOS token to end the completion with")
        return before + text + eos


def _common(whole: str, beginning: str) -> int:
    """How many characters the two have in common at their beginnings."""
    return len(beginning) if whole.startswith(beginning) else len(commonprefix([whole, beginning]))
