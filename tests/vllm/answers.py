"""What a request came back with, in a form in which two answers are equal only if every bit of their logprobs is."""

from dataclasses import dataclass
from typing import Any

# Per generated token: (token, logprob, rank) of the chosen token and of the five most likely ones,
# sorted.
Position = tuple[tuple[str, float, int], ...]


@dataclass(frozen=True)
class Answer:
    """The result of one request."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Position, ...]
    cached_tokens: int

    @classmethod
    def of_output(cls, output: Any) -> "Answer":
        """From a finished `RequestOutput`."""
        completion = output.outputs[0]
        positions = tuple(
            tuple(sorted((str(token), entry.logprob, entry.rank or 0) for token, entry in position.items()))
            for position in completion.logprobs or ()
        )
        return cls(completion.text, tuple(completion.token_ids), positions, output.num_cached_tokens or 0)

    @classmethod
    def of_json(cls, body: dict[str, Any]) -> "Answer":
        """From the body of /v1/completions, asked with `return_token_ids` and `return_tokens_as_token_ids`."""
        choice = body["choices"][0]
        tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
        positions = tuple(tuple(sorted((token, value, 0) for token, value in top.items())) for top in tops)
        details = (body.get("usage") or {}).get("prompt_tokens_details") or {}
        return cls(choice["text"], tuple(choice["token_ids"]), positions, details.get("cached_tokens") or 0)


def differences(left: Answer, right: Answer) -> int:
    """Positions in which two answers differ in a token or in any bit of a logprob."""
    assert left.logprobs, "an answer without logprobs proves nothing"
    longer = max(len(left.logprobs), len(right.logprobs))
    pairs = zip(left.logprobs, right.logprobs, strict=False)
    return longer - sum(a == b for a, b in pairs)


def assert_identical(reference: Answer, answer: Answer, what: str) -> None:
    """Text, tokens and all logprobs must be the same, bit for bit."""
    assert answer.tokens == reference.tokens, f"{what}: tokens {answer.tokens} instead of {reference.tokens}"
    assert answer.text == reference.text, f"{what}: text {answer.text!r} instead of {reference.text!r}"
    for index, (expected, got) in enumerate(zip(reference.logprobs, answer.logprobs, strict=True)):
        assert got == expected, f"{what}: logprobs at position {index} are {got} instead of {expected}"
    assert reference.logprobs, f"{what}: no logprobs were compared"
