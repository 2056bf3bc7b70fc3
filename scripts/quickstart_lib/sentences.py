"""Varied text from a seed: sentences of a notebook, and questions about them. Standard library only."""

import random

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


def sentence(source: random.Random) -> str:
    """One entry of a notebook; entries are hardly ever equal."""
    when = f"On {source.choice(DAYS)} at {source.randrange(24):02}:{source.randrange(60):02}"
    who = f"the {source.choice(ROLES)} of {source.choice(PLACES)}"
    what = f"{source.choice(VERBS)} {source.randrange(2, 900)} {source.choice(THINGS)}"
    return f"{when} {who} {what} {source.choice(REASONS)}."


def question(source: random.Random) -> str:
    """A question about a notebook."""
    chosen = source.choice(QUESTIONS)
    return chosen.format(role=source.choice(ROLES), place=source.choice(PLACES), thing=source.choice(THINGS))
