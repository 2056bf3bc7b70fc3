"""Synthetic conversations: varied text from a seed, as token ids in the model's own chat format."""

import random
from pathlib import Path

from tokenizers import Tokenizer

from quickstart_lib.sentences import question, sentence


class Writer:
    """Writes prompts; the same seed gives the same token ids. Different `label`s differ from their first words on."""

    def __init__(self, model: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._seed = seed

    def opening(self, label: str, tokens: int) -> list[int]:
        """First prompt of a conversation, exactly `tokens` token ids long."""
        source = random.Random(f"{self._seed}/{label}")
        head = self._encode(f"<|im_start|>system\nNotebook {label}, volume {source.randrange(10**6)}.<|im_end|>\n")
        tail = self._encode(f"\n{question(source)}<|im_end|>\n<|im_start|>assistant\n")
        body = self._encode("<|im_start|>user\n")
        while len(head) + len(body) + len(tail) < tokens:
            body += self._encode(sentence(source) + " ")
        return head + body[: tokens - len(head) - len(tail)] + tail

    def follow_up(self, label: str, turn: int) -> list[int]:
        """What is appended after the answer to turn `turn - 1`: the answer's end and the next question."""
        source = random.Random(f"{self._seed}/{label}/{turn}")
        remark = sentence(source)
        return self._encode(
            f"<|im_end|>\n<|im_start|>user\n{remark} {question(source)}<|im_end|>\n<|im_start|>assistant\n"
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
