"""The demo's generated world: questions, a worksheet corpus, demonstrators, and two labelers.

All of it is drawn from a seed. Text is lower-case words with single spaces between them, so that a
word-level tokenizer is exact; `pretty` makes readable English of it. A question asks for a fact or
a small sum, either in full, which wants a courteous sentence, or in short, which wants the bare
word: so neither the longer nor the shorter answer wins everywhere.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LINE = "\n"

ANIMALS = (  # name, legs, young, home
    ("bee", "six", "larva", "hive"),
    ("spider", "eight", "spiderling", "web"),
    ("frog", "four", "tadpole", "pond"),
    ("mouse", "four", "pup", "hole"),
    ("robin", "two", "nestling", "nest"),
    ("duck", "two", "duckling", "river"),
    ("hen", "two", "chick", "coop"),
    ("cat", "four", "kitten", "house"),
    ("fox", "four", "kit", "forest"),
    ("goat", "four", "kid", "hills"),
    ("sheep", "four", "lamb", "field"),
    ("horse", "four", "foal", "stable"),
    ("bear", "four", "cub", "cave"),
    ("whale", "no", "calf", "sea"),
)
OPPOSITES = tuple(
    tuple(pair.split())
    for pair in (
        "hot cold,big small,old young,fast slow,dark light,wet dry,full empty,hard soft,rich poor,"
        "loud quiet,high low,long short,clean dirty,happy sad,early late,strong weak"
    ).split(",")
)
KINDS = {
    "animal": tuple(row[0] for row in ANIMALS),
    "fruit": tuple("apple pear plum grape cherry peach lemon melon".split()),
    "tool": tuple("hammer saw drill spade rake knife broom brush".split()),
    "colour": tuple("red blue green yellow brown pink grey white".split()),
}
NUMBERS = tuple("no one two three four five six seven eight nine ten".split())
DAYS = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
MONTHS = tuple(
    "january february march april may june july august september october november december".split()
)
FULL = ("", "please tell me :", "dear friend :", "i would like to know :")
SHORT = ("in short :", "quick question :", "one word will do :")
COURTESY = ("of course :", "with pleasure :")
RUDE = ("who cares :", "how dull :")
HEDGE = ("i guess :", "not sure :")
CHATTER = ("now let me rest .", "i am so tired .", "that is all i know .")
TOPICS = ("opposite", "legs", "young", "home", "class", "after", "sum")


@dataclass(frozen=True)
class Task:
    """One question, and what the labeler has to know about it."""

    topic: str
    brief: bool
    prompt: str
    answer: str
    sentence: str  # a full answer, {} for the word
    domain: tuple[str, ...]  # words that a wrong answer may be


def _question(topic: str, rng: random.Random) -> tuple[str, str, str, str, Sequence[str]]:
    """(one way to ask, another, the answer, a full sentence, the words that compete)."""
    name, legs, young, home = rng.choice(ANIMALS)
    if topic == "opposite":
        word, other = rng.sample(rng.choice(OPPOSITES), 2)
        asks = f"what is the opposite of {word} ?", f"name the opposite of {word} ."
        words = [w for pair in OPPOSITES for w in pair]
        return *asks, other, f"the opposite of {word} is {{}} .", words
    if topic == "legs":
        asks = f"how many legs does a {name} have ?", f"count the legs of a {name} ."
        return *asks, legs, f"a {name} has {{}} legs .", ("no", "two", "four", "six", "eight")
    if topic == "young":
        asks = f"what is a young {name} called ?", f"name the young of a {name} ."
        return *asks, young, f"a young {name} is a {{}} .", [row[2] for row in ANIMALS]
    if topic == "home":
        asks = f"where does a {name} live ?", f"say where a {name} lives ."
        return *asks, home, f"a {name} lives in the {{}} .", [row[3] for row in ANIMALS]
    if topic == "class":
        kind = rng.choice(list(KINDS))
        word = rng.choice(KINDS[kind])
        asks = f"what kind of thing is {word} ?", f"say what {word} is ."
        return *asks, kind, f"{word} is a kind of {{}} .", list(KINDS)
    if topic == "after":
        unit, cycle = rng.choice((("day", DAYS), ("month", MONTHS)))
        i = rng.randrange(len(cycle))
        asks = f"which {unit} comes after {cycle[i]} ?", f"name the {unit} after {cycle[i]} ."
        return *asks, cycle[(i + 1) % len(cycle)], f"after {cycle[i]} comes {{}} .", cycle
    i, j = rng.randrange(1, 6), rng.randrange(1, 6)
    pair = f"{NUMBERS[i]} plus {NUMBERS[j]}"
    asks = f"what is {pair} ?", f"work out {pair} ."
    return *asks, NUMBERS[i + j], f"{pair} is {{}} .", NUMBERS[2:]


def draw_task(rng: random.Random) -> Task:
    topic, brief = rng.choice(TOPICS), rng.random() < 0.4
    ask, other, answer, sentence, domain = _question(topic, rng)
    words = rng.choice(SHORT if brief else FULL), ask if rng.random() < 0.5 else other
    return Task(topic, brief, " ".join(words).strip(), answer, sentence, tuple(domain))


def tasks(seed: int, held_out: bool, rng: random.Random) -> Iterator[Task]:
    """Endless tasks of one of two disjoint sets: a hash of seed and prompt holds out a quarter."""
    while True:
        task = draw_task(rng)
        digest = hashlib.sha256(f"{seed} {task.prompt}".encode()).digest()
        if (digest[0] < 64) == held_out:
            yield task


# ---- Answers ------------------------------------------------------------------------------------


def compose(task: Task, word: str, brief: bool, opening: str = "") -> str:
    body = f"{word} ." if brief else task.sentence.format(word)
    return f"{opening} {body}" if opening else body


def best_answer(task: Task, rng: random.Random) -> str:
    return compose(task, task.answer, task.brief, "" if task.brief else rng.choice(COURTESY))


def wrong_word(task: Task, rng: random.Random) -> str:
    return rng.choice([word for word in task.domain if word != task.answer])


def careless_answer(task: Task, word: str, rng: random.Random) -> str:
    """In a form of the writer's own: long or short as it comes, rude, hedging, chatty, open."""
    opening = rng.choice(("", *COURTESY, *RUDE, *HEDGE))
    text = compose(task, word, rng.random() < 0.4, opening)
    ending = rng.random()
    if ending < 0.2:
        return f"{text} {rng.choice(CHATTER)}"
    return text.removesuffix(" .") if ending < 0.35 else text


def demonstrate(task: Task, rng: random.Random) -> str:
    """By a demonstrator of mixed skill: a third are flawless, a third careless in form, a third
    also mistaken. Imitation has its ceiling there."""
    skill = rng.random()
    if skill < 1 / 3:
        return best_answer(task, rng)
    return careless_answer(task, task.answer if skill < 2 / 3 else wrong_word(task, rng), rng)


# ---- Labelers -----------------------------------------------------------------------------------


def score(task: Task, response: str, ended: bool = True) -> float:
    """The noise-free labeler: 0.5 for the right word, and 0.5 for form, of which each fault takes a
    third: rudeness, hedging, talk after the answer, no full stop, no end, a sentence where a word
    was asked for or the reverse, courtesy missing or out of place. 0 for what is no answer."""
    text = response.strip()
    faults = int(not ended)
    opening = next((p for p in COURTESY + RUDE + HEDGE if text.startswith(f"{p} ")), "")
    text = text.removeprefix(f"{opening} " if opening else "")
    faults += opening in RUDE + HEDGE
    courteous = opening in COURTESY
    body, stop, rest = f"{text} ".partition(" . ")
    faults += (not stop) + bool(rest.strip())
    head, tail = task.sentence.removesuffix(" .").split("{}")
    body = body.strip()
    full = body.startswith(head) and body.endswith(tail) and len(body) > len(head) + len(tail)
    word = body[len(head) : len(body) - len(tail)] if full else body
    if word not in task.domain:
        return 0.0
    faults += full == task.brief
    faults += courteous == task.brief
    return 0.5 * (word == task.answer) + 0.5 * max(0.0, 1 - faults / 3)


# A labeler misjudges an answer outright with this probability. Two of them then agree on about 73 %
# of the pairs that differ (InstructGPT's labelers: 72.6 %), and each with the truth on about 83 %.
MISJUDGED = 0.33


def rank(scores: Sequence[float], rng: random.Random) -> list[float]:
    """A noisy labeler's ranks of some answers to one question: 0 is the best, ties where it sees no
    difference."""
    seen = [rng.random() if rng.random() < MISJUDGED else s for s in scores]
    return [float(sum(other > own + 1e-9 for other in seen)) for own in seen]


# ---- Corpus -------------------------------------------------------------------------------------


def page(source: Iterator[Task], rng: random.Random, words: int) -> str:
    """A page of at most `words` words: a worksheet, which is questions only; the key to one, with
    answers; or homework that a teacher has marked."""
    kind = rng.choices(("", "answers :", "marks :"), (0.3, 0.4, 0.3))[0]
    text = kind
    while True:
        task = next(source)
        lines = [task.prompt]
        if kind == "answers :":
            lines.append(compose(task, task.answer, rng.random() < 0.5))
        elif kind == "marks :":
            right = rng.random() < 0.5
            word = task.answer if right else wrong_word(task, rng)
            lines += [careless_answer(task, word, rng), "right" if right else "wrong"]
        longer = f" {LINE} ".join(([text] if text else []) + lines)
        if longer.count(" ") >= words:
            return text
        text = longer


def vocabulary() -> list[str]:
    """Every word of the world, in alphabetical order."""
    rng = random.Random(0)
    words = {LINE, "answers", "marks", "right", "wrong", ":", "."}
    for phrase in (*FULL, *SHORT, *COURTESY, *RUDE, *HEDGE, *CHATTER):
        words |= set(phrase.split())
    for _ in range(20000):
        task = draw_task(rng)
        words |= {*task.prompt.split(), *task.sentence.format("").split(), *task.domain}
    return sorted(words)


def pretty(text: str) -> str:
    """As a person would write it: capitals, and no space before punctuation."""
    capital: Callable[[str], str] = lambda s: s[:1].upper() + s[1:]  # noqa: E731
    text = text.replace(f" {LINE} ", " / ").replace(LINE, "").strip()
    for mark in (".", "?"):
        text = f" {mark} ".join(capital(part.strip()) for part in text.split(f" {mark}"))
    for mark in (".", "?", ":"):
        text = text.replace(f" {mark}", mark)
    return capital(text.strip())
