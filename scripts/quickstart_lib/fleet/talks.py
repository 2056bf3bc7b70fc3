"""The load: seeded conversations that share system prompts, and the order in which their turns are asked."""

import random
from dataclasses import dataclass

from quickstart_lib.fleet.arguments import FleetArguments
from quickstart_lib.sentences import question, sentence

REMARKS_MIN, REMARKS_MAX = 2, 4


@dataclass(frozen=True)
class Talk:
    """One conversation: what its user will say, whatever is answered."""

    system: str
    questions: tuple[str, ...]


def write(arguments: FleetArguments) -> list[Talk]:
    """All conversations; each system prompt is shared by as many as possible."""
    systems = [_system(arguments, index) for index in range(arguments.systems)]
    return [
        Talk(systems[index % arguments.systems], _questions(arguments, index))
        for index in range(arguments.conversations)
    ]


def order(arguments: FleetArguments) -> list[int]:
    """Which conversation is asked its next turn, request by request: mixed, but a user who got an answer lets as many
    others go first as requests may be in flight, as long as there are others.
    """
    source = random.Random(f"{arguments.seed}/order")
    left = dict.fromkeys(range(arguments.conversations), arguments.turns)
    found: list[int] = []
    while left:
        recent = set(found[-arguments.concurrency :])
        free = [talk for talk in left if talk not in recent] or list(left)
        talk = source.choices(free, weights=[left[it] for it in free])[0]
        found.append(talk)
        left[talk] -= 1
        if left[talk] == 0:
            del left[talk]
    return found


def _system(arguments: FleetArguments, index: int) -> str:
    source = random.Random(f"{arguments.seed}/system/{index}")
    entries = " ".join(sentence(source) for _ in range(arguments.system_sentences))
    return f"You answer questions about notebook {index}, volume {source.randrange(10**6)}. Its entries: {entries}"


def _questions(arguments: FleetArguments, index: int) -> tuple[str, ...]:
    source = random.Random(f"{arguments.seed}/talk/{index}")

    def ask() -> str:
        remarks = [sentence(source) for _ in range(source.randint(REMARKS_MIN, REMARKS_MAX))]
        return " ".join([*remarks, question(source)])

    return tuple(ask() for _ in range(arguments.turns))
