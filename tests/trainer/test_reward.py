"""Stage 2: the reward model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_trainer.cli import main
from rlhf_trainer.config import ConfigError, DataError
from rlhf_trainer.data import Demonstration, Ranking
from rlhf_trainer.reward import train_reward
from rlhf_trainer.scalar import ScalarModel, score_responses

HH = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_rlhf_harmless_base.jsonl.gz"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_reward_model_learns_pairs(reward_config, make_model, tokenizer, pairs, kind):
    result = train_reward(
        reward_config(heldout_share=0.3, epochs=8),
        model=make_model(kind),
        tokenizer=tokenizer,
        train=pairs,
    )
    assert result.accuracy == 1.0
    assert result.history[-1]["loss"] < 0.1 < 0.5 < result.history[0]["loss"]
    better = score_responses(result.model, tokenizer, ["say f"], ["c good"])
    worse = score_responses(result.model, tokenizer, ["say f"], ["c c bad"])
    assert better > worse
    saved = AutoModelForSequenceClassification.from_pretrained(result.folder)
    assert saved.config.num_labels == 1
    assert score_responses(ScalarModel(saved), tokenizer, ["say f"], ["c good"]) == pytest.approx(
        better, rel=1e-5
    )


def test_reward_model_learns_rankings(reward_config, make_model, tokenizer, rankings, pairs):
    """K completions a prompt, and a file that mixes them with pairs."""
    result = train_reward(
        reward_config(epochs=15, micro_batch_size=3),
        model=make_model(),
        tokenizer=tokenizer,
        train=rankings + pairs,
        heldout=rankings[:2],
    )
    assert result.accuracy == 1.0
    answers = ["good good", "good a", "a"]
    scores = score_responses(result.model, tokenizer, ["say a"] * 3, answers)
    assert scores == sorted(scores, reverse=True)


def test_loss_is_minus_log_sigmoid_averaged_per_prompt(
    reward_config, make_model, tokenizer, rankings
):
    """InstructGPT's equation 1 from scores that are computed one sequence at a time."""
    torch.manual_seed(5)
    model = ScalarModel.from_causal_lm(make_model(), 0)
    expected, ordered = 0.0, 0
    for ranking in rankings:
        texts, prompts = list(ranking.completions), [ranking.prompt] * 4
        scores = torch.tensor(
            [score_responses(model, tokenizer, [p], [t])[0] for p, t in zip(prompts, texts)]  # noqa: B905
        )
        pairs = [
            (scores[i], scores[j])
            for i in range(4)
            for j in range(4)
            if ranking.ranks[i] < ranking.ranks[j]
        ]
        assert len(pairs) == 5  # of 6: one is a tie
        losses = [-torch.nn.functional.logsigmoid(w - r).item() for w, r in pairs]
        expected += sum(losses) / len(losses) / len(rankings)
        ordered += sum(bool(w > r) for w, r in pairs)
    for size in (1, 4, 6):
        torch.manual_seed(5)
        fresh = ScalarModel.from_causal_lm(make_model(), 0)
        result = train_reward(
            reward_config(f"micro-{size}", micro_batch_size=size, epochs=1),
            model=fresh,
            tokenizer=tokenizer,
            train=rankings,
            heldout=[],
        )
        assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert result.history[0]["accuracy"] == pytest.approx(ordered / 30)
        assert result.accuracy is None


def test_ranks_that_float32_would_tie_are_pairs(reward_config, make_model, tokenizer, rankings):
    """Only the order of the ranks counts: a constant beside them changes nothing."""
    losses = []
    for offset in (0, 2**24, 2**60):
        moved = [
            Ranking(r.prompt, r.completions, tuple(offset + int(x) for x in r.ranks))
            for r in rankings
        ]
        torch.manual_seed(5)
        result = train_reward(
            reward_config(f"moved-{offset}", epochs=1),
            model=ScalarModel.from_causal_lm(make_model(), 0),
            tokenizer=tokenizer,
            train=moved,
            heldout=[],
        )
        losses.append(result.history[0]["loss"])
    assert losses[0] == losses[1] == losses[2]


def test_pairwise_and_k_wise_loss_meet_at_two_completions(
    reward_config, make_model, tokenizer, pairs, rankings
):
    """One prompt with four completions in the batch: alone it leaves the pairs to the pairwise
    loss, in one micro-batch with them all go through the K-wise one."""
    curves = []
    for size in (1, 19):
        torch.manual_seed(5)
        result = train_reward(
            reward_config(f"micro-{size}", micro_batch_size=size, batch_size=19, epochs=4),
            model=ScalarModel.from_causal_lm(make_model(), 0),
            tokenizer=tokenizer,
            train=[*pairs, rankings[0]],
            heldout=[],
        )
        curves.append([row["loss"] for row in result.history])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_reference_backend_gives_the_same_curve(
    reward_config, make_model, tokenizer, rankings, pairs, untimed
):
    histories = []
    for backend in ("auto", "reference"):
        torch.manual_seed(5)
        result = train_reward(
            reward_config(backend, backend=backend, learning_rate=1e-3, micro_batch_size=2),
            model=ScalarModel.from_causal_lm(make_model(), 0),
            tokenizer=tokenizer,
            train=rankings + pairs,
            heldout=rankings[:2],
        )
        histories.append(untimed(result.history))
    for one, two in zip(*histories, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_scores_of_the_reference_answers_average_zero(
    reward_config, make_model, tokenizer, pairs, kind
):
    reference = [Demonstration("say a", "a good"), Demonstration("say b", "b good")]
    result = train_reward(
        reward_config(epochs=8),
        model=make_model(kind),
        tokenizer=tokenizer,
        train=pairs,
        reference=reference,
    )
    answers = ["a good", "b good", "a a bad"]
    good, also, bad = score_responses(result.model, tokenizer, ["say a", "say b", "say a"], answers)
    assert good + also == pytest.approx(0, abs=1e-5)
    assert bad < -0.5
    again = ScalarModel.load(str(result.folder))
    assert score_responses(again, tokenizer, ["say a"], ["a good"]) == pytest.approx(
        [good], abs=1e-5
    )


def test_bad_reference_answers_are_found_before_training(
    reward_config, make_model, tokenizer, pairs
):
    for prompt, error in (("<eos>", "expected text with tokens"), ("a " * 70, "at most the model")):
        config = reward_config(prompt[:1])
        with pytest.raises(ValueError, match=error):
            train_reward(
                config, model=make_model(), tokenizer=tokenizer, train=pairs,
                reference=[Demonstration(prompt, "a")],
            )  # fmt: skip
        assert not (config.output / "metrics.jsonl").exists()


def test_resumed_run_equals_the_uninterrupted_one(
    reward_config, make_model, tokenizer, pairs, interrupt, same_weights, untimed
):
    data = {"tokenizer": tokenizer, "train": pairs, "heldout": pairs[:3]}
    options = {"dropout": 0.2, "save_every": 4, "epochs": 4, "micro_batch_size": 4}
    whole = train_reward(reward_config("whole", **options), model=make_model(), **data)
    config = reward_config("broken", **options)
    with pytest.raises(interrupt.error):
        train_reward(config, model=make_model(), on_step=interrupt(6), **data)
    config.resume = True
    resumed = train_reward(config, model=make_model(), **data)
    assert same_weights(resumed.model, whole.model)
    assert untimed(resumed.history) == untimed(whole.history)


def test_rankings_without_an_order_are_dropped(reward_config, make_model, tokenizer, pairs, capsys):
    tied = Ranking("say a", ("a", "b"), (1, 1))
    train_reward(
        reward_config(epochs=1), model=make_model(), tokenizer=tokenizer, train=[tied, *pairs],
        heldout=[],
    )  # fmt: skip
    assert "18 prompts, 0 held out, 1 dropped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="completions not all tied, got none in 1 rankings"):
        train_reward(
            reward_config("tied"), model=make_model(), tokenizer=tokenizer, train=[tied],
            heldout=[],
        )  # fmt: skip


def test_reward_from_dicts_skipping_the_bad_ones(
    reward_config, make_model, tokenizer, pairs, same_weights, capsys
):
    dicts: list[dict] = [
        {"prompt": p.prompt, "chosen": p.completions[0], "rejected": p.completions[1]}
        for p in pairs
    ]
    demo = {"prompt": "say a", "response": "a good"}
    bad = [
        {"prompt": "say a", "chosen": "a", "rejected": ""},
        {"prompt": "say a", "chosen": "a", "rejected": "a"},
        {"prompt": "<eos>", "chosen": "a", "rejected": "b"},
    ]
    results = []
    for name, train, reference, options in (
        ("typed", pairs, [Demonstration("say a", "a good")], {}),
        ("dicts", dicts, [demo], {}),
        ("skip", [*dicts, *bad], [demo, {"prompt": "say a", "response": " "},
                                  {"prompt": "<eos>", "response": "a"}], {"on_bad_line": "skip"}),
    ):  # fmt: skip
        results.append(
            train_reward(
                reward_config(name, epochs=1, **options),
                model=make_model(),
                tokenizer=tokenizer,
                train=train,
                heldout=[],
                reference=reference,
            )
        )
    said = capsys.readouterr().out
    for result in results[1:]:
        assert same_weights(result.model, results[0].model)
    (zero,) = score_responses(results[2].model, results[2].tokenizer, ["say a"], ["a good"])
    assert zero == pytest.approx(0, abs=1e-5)  # of the one reference that can be used
    assert "skipped 2 of 21 examples of train; the first: train[18]: rejected: expected" in said
    assert "skipped 1 of 3 examples of reference; the first: reference[1]: response: exp" in said
    assert "18 prompts, 0 held out, 1 dropped" in said
    for k, message in enumerate(("rejected: expected", "chosen, rejected: ", "prompt: expected")):
        with pytest.raises(DataError, match=rf"train\[1\]: {message}"):
            train_reward(
                reward_config("bad"), model=make_model(), tokenizer=tokenizer,
                train=[dicts[0], bad[k]], heldout=[],
            )  # fmt: skip


def test_pairs_that_the_cut_makes_the_same_are_dropped(
    reward_config, make_model, tokenizer, pairs, capsys
):
    train = [*pairs, Ranking("say a", ("a a a good", "a a a bad"), (1, 2))]
    config = reward_config(epochs=1, max_response_tokens=3)
    train_reward(config, model=make_model(), tokenizer=tokenizer, train=train, heldout=[])
    # "x y y bad <eos>" is cut, "x y good <eos>" is not; the pair that is the same is gone.
    said = (
        "18 prompts, 0 held out, 1 dropped (too long, or all tied or the same); 18 completions cut"
    )
    assert said in capsys.readouterr().out


def test_empty_reference_is_refused_before_training(reward_config, make_model, tokenizer, pairs):
    config = reward_config(on_bad_line="skip")
    for reference, message in (
        ([], "reference: no examples"),
        ([{"prompt": "<eos>", "response": "a"}], "reference: expected an answer whose prompt"),
    ):
        with pytest.raises(DataError, match=message):
            train_reward(
                config, model=make_model(), tokenizer=tokenizer, train=pairs, heldout=[],
                reference=reference,
            )  # fmt: skip
    assert not (config.output / "metrics.jsonl").exists()


@pytest.mark.skipif(not HH.exists(), reason="the HH-RLHF sample is not beside this checkout")
def test_reward_on_real_preferences_by_the_command_line(tmp_path):
    """160 lines, of which the short ones are kept: the model fits them far better than a coin."""
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        lines = [next(file) for _ in range(160)]
    (tmp_path / "hh.jsonl").write_text("".join(lines), encoding="utf-8")
    output = tmp_path / "run"
    main(
        f"reward --model scratch:gpt2-tiny --train-file {tmp_path}/hh.jsonl --output {output} "
        "--epochs 3 --batch-size 8 --learning-rate 1e-3 --max-prompt-tokens 96 "
        "--max-response-tokens 48 --device cpu --no-progress".split()
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = [row["accuracy"] for row in rows if row["epoch"] > 2]
    assert sum(last) / len(last) > 0.75
    assert rows[-1]["heldout_accuracy"] is not None
    ScalarModel.load(str(output / "model"))
