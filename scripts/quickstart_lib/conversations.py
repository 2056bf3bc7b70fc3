"""Synthetic conversations: varied text from a seed, as token ids in the model's own chat format."""

import random
from pathlib import Path

from tokenizers import Tokenizer

ROLES = [
    "archivist",
    "surveyor",
    "night nurse",
    "stonemason",
    "ferry captain",
    "beekeeper",
    "radio operator",
    "botanist",
    "clockmaker",
    "lighthouse keeper",
    "cartographer",
    "locksmith",
    "glassblower",
    "geologist",
]
PLACES = [
    "the northern depot",
    "Halvorsen Bay",
    "the old observatory",
    "platform nine",
    "the salt works",
    "Mirador hill",
    "the flooded quarry",
    "the upper mill",
    "Dunmore bridge",
    "the tram yard",
    "the seed vault",
]
VERBS = [
    "recorded",
    "repaired",
    "misplaced",
    "counted",
    "exchanged",
    "inspected",
    "returned",
    "labelled",
    "delivered",
    "rejected",
    "weighed",
]
THINGS = [
    "copper valves",
    "sealed ledgers",
    "rain gauges",
    "cedar planks",
    "spare lenses",
    "water samples",
    "brass keys",
    "signal lamps",
    "wool blankets",
    "fossil plates",
    "tide tables",
    "clay pipes",
]
REASONS = (
    "because the inventory disagreed with the invoice",
    "before the storm closed the road",
    "after a long talk with the harbour office",
    "although nobody had signed for them",
    "so that the next shift could start at once",
    "while the generator was being replaced",
)
QUESTIONS = (
    "Who was responsible for the {thing}, and what should happen to them next?",
    "Summarise what happened at {place} in one sentence.",
    "Which entry mentions the {role}, and does it agree with the others?",
    "Write a short note to the {role} about the {thing}.",
    "What is still missing before the work at {place} can be closed?",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Writer:
    """Writes prompts; the same seed gives the same token ids. Different `label`s differ from their first words on."""

    def __init__(self, model: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._seed = seed

    def opening(self, label: str, tokens: int) -> list[int]:
        """First prompt of a conversation, exactly `tokens` token ids long."""
        source = random.Random(f"{self._seed}/{label}")
        head = self._encode(f"<|im_start|>system\nNotebook {label}, volume {source.randrange(10**6)}.<|im_end|>\n")
        tail = self._encode(f"\n{self._question(source)}<|im_end|>\n<|im_start|>assistant\n")
        body = self._encode("<|im_start|>user\n")
        while len(head) + len(body) + len(tail) < tokens:
            body += self._encode(self._sentence(source) + " ")
        return head + body[: tokens - len(head) - len(tail)] + tail

    def follow_up(self, label: str, turn: int) -> list[int]:
        """What is appended after the answer to turn `turn - 1`: the answer's end and the next question."""
        source = random.Random(f"{self._seed}/{label}/{turn}")
        remark = self._sentence(source)
        return self._encode(
            f"<|im_end|>\n<|im_start|>user\n{remark} {self._question(source)}<|im_end|>\n<|im_start|>assistant\n"
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _sentence(self, source: random.Random) -> str:
        when = f"On {source.choice(DAYS)} at {source.randrange(24):02}:{source.randrange(60):02}"
        who = f"the {source.choice(ROLES)} of {source.choice(PLACES)}"
        what = f"{source.choice(VERBS)} {source.randrange(2, 900)} {source.choice(THINGS)}"
        return f"{when} {who} {what} {source.choice(REASONS)}."

    def _question(self, source: random.Random) -> str:
        chosen = source.choice(QUESTIONS)
        return chosen.format(role=source.choice(ROLES), place=source.choice(PLACES), thing=source.choice(THINGS))
