"""Sentences to read: a small grammar over everyday words, with more sentences than any corpus needs."""

from collections.abc import Callable

import numpy as np

_PEOPLE = (
    """
the baker|the captain|my neighbour|our teacher|the young doctor|a tall stranger|the gardener|her uncle|their cousin
the pilot|the old fisherman|a quiet student|the night nurse|my brother|the mayor|an engineer|the violin player
his grandmother|the shopkeeper|a tired traveller|the judge|the carpenter|two farmers|the children|some visitors
everyone in the village
""".strip()
    .replace("\n", "|")
    .split("|")
)
_THINGS = (
    """
a wooden box|the blue lantern|seven oranges|the broken clock|a map of the valley|an old photograph|the last ticket
a jar of honey|the garden gate|three heavy books|a basket of cherries|the silver key|some fresh bread|a yellow umbrella
the morning paper|a pair of boots|the church bell|an empty bottle|the long rope|a small engine|the kitchen table
a bag of flour|the brown horse|a letter from Vienna|the choir's new piano|half of the cheese|a very thick blanket
""".strip()
    .replace("\n", "|")
    .split("|")
)
_DEEDS = (
    """
found|carried|sold|painted|forgot|mended|borrowed|described|hid|measured|admired|lifted|photographed|bought|counted
pushed|dropped|examined|chose|remembered|guarded|washed|drew|returned|showed us|gave away|looked at|asked about
""".strip()
    .replace("\n", "|")
    .split("|")
)
_PLACES = (
    """
behind the station|near the river|in the market square|on the third floor|under the old bridge|at the edge of the forest
beside the harbour|in a narrow street|at the railway museum|on top of the hill|outside the theatre|in the back room
by the open window|along the coast road|between two villages|at the foot of the stairs|in front of the bank
""".strip()
    .replace("\n", "|")
    .split("|")
)
_TIMES = (
    """
last Thursday|early in the morning|just before midnight|after a long winter|every second Sunday|in the spring
on the way home|while it was raining|during the holidays|a week ago|long before breakfast|at a quarter past nine
when nobody was watching|as soon as the sun came up|for the first time in years|twenty minutes later
""".strip()
    .replace("\n", "|")
    .split("|")
)
_REASONS = (
    """
because the weather was changing|although it cost too much|since the shop would close early|so that we could leave
because of the noise|even though the road was icy|as the judge had ordered|to please the younger guests
without saying why|in spite of the fog|just to be sure|for reasons of health|because the choice was theirs|as usual
""".strip()
    .replace("\n", "|")
    .split("|")
)
_JUDGEMENTS = (
    """
surprisingly cheap|far too loud|worth the journey|as good as new|rather difficult to explain|quite harmless
almost impossible to see|much larger than before|wonderfully simple|a matter of taste|cold and grey|the talk of the town
""".strip()
    .replace("\n", "|")
    .split("|")
)
_QUESTIONS = (
    """
Could you tell me why|Do you know whether|Have you heard that|Is it true that|Who would believe that|Did they say when
""".strip()
    .replace("\n", "|")
    .split("|")
)

_Pick = Callable[[list[str]], str]


def _statement(pick: _Pick) -> str:
    return f"{pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)} {pick(_PLACES)}"


_PATTERNS: tuple[Callable[[_Pick], str], ...] = (
    lambda pick: f"{pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)}.",
    lambda pick: f"{pick(_THINGS)} was {pick(_JUDGEMENTS)}.",
    lambda pick: f"{_statement(pick)}.",
    lambda pick: f"{pick(_TIMES)}, {pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)}.",
    lambda pick: f"{_statement(pick)} {pick(_REASONS)}.",
    lambda pick: f"{pick(_THINGS)} {pick(_PLACES)} was {pick(_JUDGEMENTS)}.",
    lambda pick: f"{pick(_QUESTIONS)} {_statement(pick)}?",
    lambda pick: f"{pick(_PEOPLE)} thought it was {pick(_JUDGEMENTS)}, but {_statement(pick)}.",
    lambda pick: f"{pick(_TIMES)} {pick(_PEOPLE)} came back, and {pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)}.",
)


def compose(rng: np.random.Generator, num_words: int) -> str:
    """Whole sentences with at least `num_words` words together.

    >>> len(compose(np.random.default_rng(0), 12).split()) >= 12
    True
    """

    def pick(phrases: list[str]) -> str:
        return phrases[rng.integers(len(phrases))]

    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < num_words:
        sentence = _PATTERNS[rng.integers(len(_PATTERNS))](pick)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)
