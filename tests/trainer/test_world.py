"""The demo's world: the labelers, the split, the corpus."""

from __future__ import annotations

import random

import pytest

from rlhf_trainer import world
from rlhf_trainer.demo import agreement
from rlhf_trainer.world import Task

FULL = Task(
    topic="legs",
    brief=False,
    prompt="how many legs does a hen have ?",
    answer="two",
    sentence="a hen has {} legs .",
    domain=("no", "two", "four", "six", "eight"),
)
BRIEF = Task(
    topic="legs",
    brief=True,
    prompt="in short : how many legs does a hen have ?",
    answer="two",
    sentence="a hen has {} legs .",
    domain=("no", "two", "four", "six", "eight"),
)


@pytest.mark.parametrize(
    ("task", "response", "expected"),
    [
        (FULL, "of course : a hen has two legs .", 1.0),
        (FULL, "of course : a hen has four legs .", 0.5),  # wrong, in perfect form
        (FULL, "a hen has two legs .", 1 - 1 / 6),  # no courtesy
        (FULL, "how dull : a hen has two legs .", 1 - 2 / 6),  # rude, and so not courteous
        (FULL, "of course : a hen has two legs", 1 - 1 / 6),  # no full stop
        (FULL, "of course : a hen has two legs . i am so tired .", 1 - 1 / 6),
        (FULL, "two .", 1 - 2 / 6),  # a word where a sentence was asked for
        (FULL, "who cares : four", 0.0),
        (BRIEF, "two .", 1.0),
        (BRIEF, "four .", 0.5),
        (BRIEF, "a hen has two legs .", 1 - 1 / 6),
        (BRIEF, "of course : a hen has two legs .", 1 - 2 / 6),
        (FULL, "what is the opposite of hot ?", 0.0),  # a question is no answer
        (FULL, "of course : a cat has two legs .", 0.0),  # about something else
        (FULL, "", 0.0),
    ],
)
def test_noise_free_labeler(task, response, expected):
    assert world.score(task, response) == pytest.approx(expected)


def test_an_answer_without_an_end_has_a_fault():
    whole = world.score(FULL, "of course : a hen has two legs .")
    assert world.score(FULL, "of course : a hen has two legs .", ended=False) < whole


def test_best_answers_are_flawless_and_demonstrations_are_mixed():
    rng = random.Random(0)
    source = world.tasks(0, False, rng)
    drawn = [next(source) for _ in range(1000)]
    assert {t.topic for t in drawn} == set(world.TOPICS)
    assert all(world.score(t, world.best_answer(t, rng)) == 1.0 for t in drawn)
    scores = [world.score(t, world.demonstrate(t, rng)) for t in drawn]
    assert 0.45 < sum(scores) / len(scores) < 0.75
    assert 0.3 < sum(s == 1.0 for s in scores) / len(scores) < 0.5


def test_training_and_held_out_questions_are_disjoint_and_a_seed_draws_its_own():
    def prompts(seed, held_out):
        source = world.tasks(seed, held_out, random.Random(7))
        return {next(source).prompt for _ in range(3000)}

    for seed in (0, 1):
        train, held = prompts(seed, False), prompts(seed, True)
        assert not train & held
        assert len(held) > 400 and len(train) > 1000
    assert prompts(0, True) != prompts(1, True)


def test_labelers_agree_with_each_other_as_often_as_the_papers_did():
    rng = random.Random(0)
    source = world.tasks(0, False, rng)
    truth = [
        [world.score(t, world.demonstrate(t, rng)) for _ in range(4)]
        for t in (next(source) for _ in range(3000))
    ]
    first, second = (
        [[-place for place in world.rank(row, rng)] for row in truth] for _ in range(2)
    )
    assert agreement(first, second, truth) == pytest.approx(0.73, abs=0.02)
    assert agreement(truth, first) == pytest.approx(0.83, abs=0.02)


def test_pages_keep_to_their_length_and_the_vocabulary():
    rng = random.Random(0)
    source = world.tasks(0, False, rng)
    known = set(world.vocabulary())
    kinds = set()
    for _ in range(200):
        words = world.page(source, rng, 64).split(" ")
        assert 8 < len(words) <= 64
        assert set(words) <= known
        kinds.add(words[0] if words[0] in ("answers", "marks") else "worksheet")
    assert kinds == {"answers", "marks", "worksheet"}


def test_pretty():
    text = f"of course : a hen has two legs . i am so tired . {world.LINE}"
    assert world.pretty(text) == "Of course: a hen has two legs. I am so tired."
    assert world.pretty("what is a young hen called ?") == "What is a young hen called?"
