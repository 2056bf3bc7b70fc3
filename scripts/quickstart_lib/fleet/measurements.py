"""What the three ways showed: times, cached tokens, balance, and whether the texts were the same."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

from quickstart_lib.fleet.chat import Reply


@dataclass(frozen=True)
class Way:
    """A way to choose an engine. `prefix_from`: the router's mode, and what it says of its decisions."""

    name: str
    meaning: str
    prefix_from: str


ROUND_ROBIN = Way("round robin", "one engine after the other", "none")
APPROXIMATE = Way("approximate", "guesses from its decisions who holds a prefix", "approximate")
PRECISE = Way("precise", "knows from KV events who holds a prefix", "precise")
# Of the engines.
NAMES = ("a", "b")
WAYS = (ROUND_ROBIN, APPROXIMATE, PRECISE)


@dataclass(frozen=True)
class Sizes:
    """What one engine's caches hold, and all conversations together, in tokens."""

    kv_cache_tokens: int
    dram_tokens: int
    working_set_tokens: int


@dataclass(frozen=True, order=True)
class Share:
    """What one engine had to do; ordered by the prompt tokens it computed."""

    computed_tokens: int
    requests: int

    def __add__(self, other: "Share") -> "Share":
        return Share(self.computed_tokens + other.computed_tokens, self.requests + other.requests)


@dataclass
class Played:
    """All replies of one way, over all rounds.

    `talks`: for each round, each conversation's replies in order.
    `dram_tokens`: prompt tokens that came from the engines' dram tiers.
    `router`: the router's own counters, summed.
    """

    talks: list[list[list[Reply]]] = field(default_factory=list)
    dram_tokens: int = 0
    seconds: float = 0.0
    router: dict[str, float] = field(default_factory=dict)

    @property
    def replies(self) -> list[Reply]:
        """All of them."""
        return [reply for talks in self.talks for replies in talks for reply in replies]

    @property
    def ttft_seconds(self) -> list[float]:
        """Times to first token."""
        return [reply.ttft_seconds for reply in self.replies]

    def percentile_seconds(self, percent: int) -> float:
        """That percentile of the time to first token."""
        return statistics.quantiles(self.ttft_seconds, n=100, method="inclusive")[percent - 1]

    def spread_seconds(self) -> float:
        """Interquartile range of the time to first token."""
        return self.percentile_seconds(75) - self.percentile_seconds(25)

    @property
    def prompt_tokens(self) -> int:
        """Tokens sent."""
        return sum(reply.prompt_tokens for reply in self.replies)

    @property
    def cached_tokens(self) -> int:
        """Tokens of those that no engine computed."""
        return sum(reply.cached_tokens for reply in self.replies)

    @property
    def cached_share(self) -> float:
        """Cached over sent tokens."""
        return self.cached_tokens / self.prompt_tokens

    def requests(self) -> Counter[str]:
        """Requests by engine."""
        return Counter(reply.engine for reply in self.replies)

    def computed_tokens(self) -> Counter[str]:
        """Prompt tokens computed, by engine."""
        computed: Counter[str] = Counter()
        for reply in self.replies:
            computed[reply.engine] += reply.computed_tokens
        return computed

    def balance(self) -> list[Share]:
        """What the busiest engine of each round had, summed over rounds, then the next one's: engines that take turns
        in being overloaded do not cancel out.
        """
        found = [Share(0, 0)] * len(NAMES)
        for talks in self.talks:
            one = Played([talks])
            requests, computed = one.requests(), one.computed_tokens()
            shares = sorted((Share(computed[name], requests[name]) for name in NAMES), reverse=True)
            found = [before + share for before, share in zip(found, shares, strict=True)]
        return found

    def predicted_exactly(self) -> int:
        """Requests whose cached tokens the router knew to the token."""
        return sum(reply.predicted_tokens == reply.cached_tokens for reply in self.replies)


@dataclass(frozen=True)
class Texts:
    """Answers of the same turn in all ways and rounds. Once one differs, later turns of that conversation may."""

    conversations: int
    conversations_equal: int
    first_turns_equal: int


def compare_texts(played: dict[str, Played]) -> Texts:
    """How many conversations were answered alike everywhere. Greedy, but batches differ in shape, so the last bits of
    logits may, too.
    """
    playings = [talks for it in played.values() for talks in it.talks]
    versions = [[tuple(reply.text for reply in replies) for replies in talks] for talks in playings]
    together = list(zip(*versions, strict=True))
    return Texts(
        len(together),
        sum(len(set(texts)) == 1 for texts in together),
        sum(len({text[0] for text in texts}) == 1 for texts in together),
    )
