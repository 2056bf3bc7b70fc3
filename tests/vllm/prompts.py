"""Seeded prompts as token ids, and conversations that grow turn by turn."""

import random
from dataclasses import dataclass, field

# Ordinary tokens of SmolLM2 (vocabulary 49,152): no special token lies in this range.
FIRST_TOKEN = 1000
LAST_TOKEN = 40000


def prompt(rng: random.Random, length: int, first: int = FIRST_TOKEN, last: int = LAST_TOKEN) -> list[int]:
    """A prompt that shares no block with any other."""
    return [rng.randint(first, last) for _ in range(length)]


@dataclass
class Conversation:
    """Turns that each extend all tokens before them."""

    rng: random.Random
    turn_tokens: tuple[int, int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    # The first and the last token that a turn may have.
    words: tuple[int, int] = (FIRST_TOKEN, LAST_TOKEN)

    def ask(self, answer_tokens: int) -> list[int] | None:
        """The next turn's prompt, or nothing once it and its answer would pass the limit."""
        turn = prompt(self.rng, self.rng.randint(*self.turn_tokens), *self.words)
        if len(self.tokens) + len(turn) + answer_tokens > self.limit:
            return None
        self.tokens = self.tokens + turn
        return self.tokens

    def hear(self, answer: tuple[int, ...]) -> None:
        """Appends the model's answer."""
        self.tokens = self.tokens + list(answer)
