"""Chat templates as fixed strings: how a language model is asked about a prompt."""

import dataclasses

from .tokenizer import Tokenized, Tokenizer


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat of one message of a user, and the beginning of the answer.

    **Fields:**

    - `head`, `tail`: the text before and after the message.
    """

    head: str
    tail: str

    def encode(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> Tokenized:
        """Tokenizes a prompt in its chat, cut and padded to `max_length`.

        As in the pipelines of diffusers the chat is cut at its end, so that a long prompt costs the
        tail of the template first. `dropped` is what is cut off the prompt itself.

        **Raises:** as `Tokenizer.encode`.
        """
        tokens = tokenizer.encode(self.head + prompt + self.tail, max_length, strip=False)
        dropped = tokens.dropped.removesuffix(self.tail)
        if len(tokens.dropped) <= len(self.tail):
            dropped = ""
        return tokens._replace(dropped=dropped.strip())


QWEN3 = Chat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
"""Qwen3's template with thinking on: `apply_chat_template(..., enable_thinking=True)`."""

QWEN3_DIRECT = Chat(QWEN3.head, f"{QWEN3.tail}<think>\n\n</think>\n\n")
"""Qwen3's template with thinking off: the answer begins with empty thoughts."""
