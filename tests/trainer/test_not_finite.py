"""Numbers that are not finite: the step is skipped and counted, and no run ends with them."""

from __future__ import annotations

import contextlib
import io
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlhf_kernels as rk
from rlhf_trainer import demo
from rlhf_trainer.cli import main
from rlhf_trainer.config import DivergedError
from rlhf_trainer.data import comparison
from rlhf_trainer.optimizer import gradient_norm
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.reward import train_reward
from rlhf_trainer.sampling import respond
from rlhf_trainer.scalar import ScalarModel
from rlhf_trainer.sft import train_sft

PROMPTS = ["say a", "say b twice c", "good", "say d e f a"]
F = 10  # the token "f" of the word tokenizer


def count_good(prompts, responses):
    return [response.split().count("good") / 5 for response in responses]


def poison(model, tokens=(F,), scale=float("nan")):
    """A model whose loss, and so every gradient, is NaN where a text holds one of `tokens`."""

    def hook(module, args, hidden):
        (ids,) = args
        return hidden * torch.where(torch.isin(ids, torch.tensor(tokens)), scale, 1.0)[..., None]

    model.get_input_embeddings().register_forward_hook(hook)
    return model


def snapshot(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("micro_batch_size", [2, 6])  # one of several micro-batches is bad, or all
def test_one_nan_poisons_the_run(
    sft_config, make_model, tokenizer, demonstrations, max_grad_norm, micro_batch_size
):
    """ms-swift 8123. "f" is in one batch an epoch: that step leaves all weights alone."""
    train = [d for d in demonstrations if "f" not in f"{d.prompt} {d.response}"][:11]
    train.append(demonstrations[5])  # say f
    model, weights = poison(make_model()), []
    result = train_sft(
        sft_config(epochs=3, max_grad_norm=max_grad_norm, micro_batch_size=micro_batch_size),
        model=model,
        tokenizer=tokenizer,
        train=train,
        heldout=[],
        on_step=lambda row: weights.append(snapshot(model)),
    )
    bad = [row["step"] for row in result.history if row["loss"] is None]
    assert len(bad) == 3
    assert [row["step"] for row in result.history if row["grad_norm"] is None] == bad
    assert [row["skipped"] for row in result.history][-1] == 3
    start = snapshot(make_model())
    for step, (before, after) in enumerate(zip([start, *weights], weights), 1):  # noqa: B905
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in bad), step
        assert all(weight.isfinite().all() for weight in after.values())
    saved = AutoModelForCausalLM.from_pretrained(result.folder)
    assert all(weight.isfinite().all() for weight in saved.state_dict().values())


def test_the_good_steps_are_those_of_a_run_without_the_bad_ones(
    sft_config, make_model, tokenizer, demonstrations, same_weights
):
    """The optimiser's moments and step count are untouched: with a constant rate, the weights are
    those of the good batches alone, bit for bit."""
    train = demonstrations[:1]
    both = sft_config(epochs=4, lr_floor=1.0)
    seen: list[dict] = []
    plain = train_sft(
        sft_config("plain", epochs=2, lr_floor=1.0),
        model=make_model(),
        tokenizer=tokenizer,
        train=train,
        heldout=[],
    )
    model, calls = make_model(), []

    def every_second(module, args, hidden):
        calls.append(module.training)
        return hidden * (math.nan if sum(calls) % 2 == 0 and module.training else 1.0)

    model.get_input_embeddings().register_forward_hook(every_second)
    result = train_sft(
        both, model=model, tokenizer=tokenizer, train=train, heldout=[], on_step=seen.append
    )
    assert [row["loss"] is None for row in seen] == [False, True] * 2
    assert same_weights(result.model, plain.model)


def test_sft_that_diverges_ends_with_a_report(
    sft_config, make_model, tokenizer, demonstrations, capsys
):
    """Healthy for two epochs with checkpoints; then everything is NaN. The checkpoints stay."""
    model, healthy = make_model(), [True]

    def hook(module, args, hidden):
        return hidden * (1.0 if healthy[0] else math.nan)

    model.get_input_embeddings().register_forward_hook(hook)

    def on_step(row):
        if row["step"] == 6:
            healthy[0] = False

    config = sft_config(save_every=2, max_bad_steps=3)
    with pytest.raises(DivergedError) as caught:
        train_sft(
            config, model=model, tokenizer=tokenizer, train=demonstrations, heldout=[],
            on_step=on_step,
        )  # fmt: skip
    assert str(caught.value) == (
        "3 steps in a row were not finite, the last one, step 9, with loss nan, grad_norm nan; no "
        f"bad step has changed a weight; another run can start from "
        f"{config.output / 'checkpoint-4' / 'model'}"
    )
    assert "sft: step 7 is skipped: loss nan, grad_norm nan\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0] * 6 + [1, 2, 3]
    found = sorted(path.name for path in config.output.glob("checkpoint-*"))
    assert found == ["checkpoint-4", "checkpoint-6"]  # none at 8: what broke came before it
    assert not (config.output / "model").exists()
    for path in config.output.rglob("*.safetensors"):
        saved = AutoModelForCausalLM.from_pretrained(path.parent)
        assert all(weight.isfinite().all() for weight in saved.state_dict().values())


@pytest.mark.parametrize("options", ["", "--heldout-share 0", "--keep last", "--max-bad-steps 2"])
def test_a_learning_rate_of_a_million_is_no_success(
    tmp_path, write_lines, demonstrations, options, capsys
):
    rows = [{"prompt": d.prompt, "response": d.response} for d in demonstrations]
    path, output = write_lines("train.jsonl", rows), tmp_path / "run"
    args = f"sft --model scratch:llama-tiny --train-file {path} --output {output} --epochs 2 "
    args += f"--batch-size 6 --learning-rate 1e30 --device cpu --no-progress --no-plot {options}"
    with pytest.raises(SystemExit) as caught:
        main(args.split())
    assert str(caught.value.code).startswith("rlhf-train sft: ")  # to stderr, with status 1
    assert "finite" in str(caught.value.code)
    assert not (output / "model").exists()
    assert not (output / "kernels.json").exists()
    assert "best held-out loss" not in capsys.readouterr().out


def test_a_held_out_loss_that_is_not_finite_is_no_success(
    sft_config, make_model, tokenizer, demonstrations
):
    """Training is healthy; the held-out example alone is not. There is no best."""
    train = [d for d in demonstrations if "f" not in f"{d.prompt} {d.response}"]
    for keep in ("best", "last"):
        config = sft_config(keep, keep=keep, epochs=1)
        with pytest.raises(DivergedError, match="no held-out loss of the weights to keep is finit"):
            train_sft(
                config, model=poison(make_model()), tokenizer=tokenizer, train=train,
                heldout=[demonstrations[5]],
            )  # fmt: skip
        assert not (config.output / "model").exists()


def test_weights_that_are_not_finite_are_never_saved(
    sft_config, make_model, tokenizer, demonstrations
):
    """The step was finite, what it made of a weight is not: found before the checkpoint."""
    model = make_model()

    def on_step(row):
        if row["step"] == 3:
            with torch.no_grad():
                model.transformer.h[1].mlp.c_fc.bias[3] = math.inf

    config = sft_config(save_every=1)
    with pytest.raises(DivergedError, match=r"transformer\.h\.1\.mlp\.c_fc\.bias of model is not"):
        train_sft(
            config, model=model, tokenizer=tokenizer, train=demonstrations, heldout=[],
            on_step=on_step,
        )  # fmt: skip
    names = sorted(path.name for path in config.output.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2"]


def test_reward_skips_a_step_that_is_not_finite(reward_config, make_model, tokenizer, pairs):
    train = [pair for pair in pairs if " f" not in pair.prompt][:11]
    train.append(comparison("say a", "f good", "f bad"))
    model = poison(ScalarModel.from_causal_lm(make_model(), 0).model)
    config = reward_config(epochs=3, save_every=1)
    zero = {"reference": None, "heldout": []}
    with pytest.raises(DivergedError, match="the mean score of the reference answers is nan"):
        train_reward(config, model=ScalarModel(model), tokenizer=tokenizer, train=train, **zero)
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows].count(True) == 3 == rows[-1]["skipped"]
    assert not (config.output / "model").exists()  # without its bias it would be another model
    for path in config.output.rglob("*.safetensors"):
        saved = AutoModelForCausalLM.from_pretrained(path.parent)
        assert all(weight.isfinite().all() for weight in saved.state_dict().values())


def test_reward_that_diverges_ends_with_a_report(reward_config, make_model, tokenizer, pairs):
    config = reward_config(learning_rate=1e30, save_every=1, max_bad_steps=3)
    with pytest.raises(DivergedError, match="finite"):
        train_reward(config, model=make_model(), tokenizer=tokenizer, train=pairs, heldout=[])
    assert not (config.output / "model").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, None])
def test_ppo_skips_an_iteration_whose_score_is_not_finite(
    ppo_config, make_model, tokenizer, bad, capsys
):
    policy, weights, calls = make_model(), [], []

    def judge(prompts, responses):
        calls.append(snapshot(policy))
        scores = count_good(prompts, responses)
        if len(calls) == 2:
            scores[3] = bad
        return scores

    result = train_ppo(
        ppo_config(kl_target=1.0, kl_horizon=100),
        policy=policy,
        tokenizer=tokenizer,
        reward_fn=judge,
        prompts=PROMPTS,
        on_step=lambda row: weights.append(snapshot(policy)),
    )
    said = capsys.readouterr().out
    assert f"reward_fn judge: {bad} for response 3 of 16\n" in said
    assert "ppo: step 2 is skipped: score " in said
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(calls, weights)]  # noqa: B905
    assert same == [False, True, False, False]
    assert [row["skipped"] for row in result.history] == [0, 1, 1, 1]
    assert result.history[1]["score"] is None
    assert result.history[2]["kl_coef"] == result.history[1]["kl_coef"]
    assert [row["first_approx_kl"] for row in result.history if "clip_frac" in row] == [0.0] * 3


def test_ppo_whose_scores_stay_bad_ends_with_a_report(ppo_config, make_model, tokenizer):
    config = ppo_config(max_bad_steps=2, save_every=1)
    with pytest.raises(DivergedError, match=r"2 steps in a row .* step 2, with score nan"):
        train_ppo(
            config,
            policy=make_model(),
            tokenizer=tokenizer,
            reward_fn=lambda prompts, responses: [math.nan] * len(prompts),
            prompts=PROMPTS,
        )
    assert not (config.output / "model").exists()


def test_a_run_without_a_good_step_is_no_success(
    ppo_config, sft_config, make_model, tokenizer, demonstrations
):
    """Fewer bad steps than end a run, with weights that were never touched."""
    config = ppo_config()
    with pytest.raises(DivergedError, match="none of the run's steps was finite, as in score nan"):
        train_ppo(
            config,
            policy=make_model(),
            tokenizer=tokenizer,
            reward_fn=lambda prompts, responses: [math.nan] * len(prompts),
            prompts=PROMPTS,
        )
    poisoned = sft_config(epochs=1, batch_size=18)
    with pytest.raises(DivergedError, match="none of the run's steps was finite, as in loss nan"):
        train_sft(
            poisoned, model=poison(make_model()), tokenizer=tokenizer, train=demonstrations,
            heldout=[],
        )  # fmt: skip
    assert not (config.output / "model").exists()
    assert not (poisoned.output / "model").exists()


def test_the_last_iteration_may_be_a_skipped_one(ppo_config, make_model, tokenizer, monkeypatch):
    """Its weights give finite numbers: they are saved, and the command reports the one before."""
    calls = []

    def judge(prompts, responses):
        calls.append(None)
        return [math.nan if len(calls) == 4 else score for score in count_good(prompts, responses)]

    result = train_ppo(
        ppo_config(), policy=make_model(), tokenizer=tokenizer, reward_fn=judge, prompts=PROMPTS
    )
    assert result.history[-1]["score"] is None
    assert result.history[-1]["skipped"] == 1
    monkeypatch.setattr("rlhf_trainer.ppo.train_ppo", lambda config: result)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["ppo"])
    assert f"ppo: score {result.history[-2]['score']:.3f}, KL" in said.getvalue()


@pytest.mark.parametrize("part", ["policy", "value"])
def test_ppo_skips_a_minibatch_that_is_not_finite(
    ppo_config, make_model, tokenizer, monkeypatch, part
):
    """One of two minibatches of the second iteration; the other one is taken."""
    calls = []
    name = {"policy": "linear_token_loss", "value": "value_loss"}[part]
    loss_of = getattr(rk, name)

    def broken(*args, **options):
        loss, stats = loss_of(*args, **options)
        calls.append(name)
        return (loss * math.nan if len(calls) == 5 else loss), stats

    monkeypatch.setattr(rk, name, broken)
    policy = make_model()
    result = train_ppo(
        ppo_config(), policy=policy, tokenizer=tokenizer, reward_fn=count_good, prompts=PROMPTS
    )
    assert len(calls) == 16  # four iterations of two minibatches of two micro-batches
    assert [row["skipped"] for row in result.history] == [0, 1, 1, 1]
    assert all(math.isfinite(row["policy_loss"]) for row in result.history)
    assert all(weight.isfinite().all() for weight in policy.parameters())
    assert all(weight.isfinite().all() for weight in result.value.parameters())


@pytest.mark.parametrize("option", ["learning_rate", "value_learning_rate"])
def test_ppo_that_diverges_ends_with_a_report(ppo_config, make_model, tokenizer, option):
    config = ppo_config(save_every=1, **{option: 1e30})
    with pytest.raises(DivergedError, match="finite"):
        train_ppo(
            config, policy=make_model(), tokenizer=tokenizer, reward_fn=count_good, prompts=PROMPTS
        )
    assert not (config.output / "model").exists()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_from_a_broken_model_says_so(make_model, tokenizer, temperature):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(DivergedError, match="expected finite logits to sample from, got NaN"):
        respond(model, tokenizer, PROMPTS, max_response_tokens=3, temperature=temperature)


def test_the_demos_base_model_ends_with_a_report(monkeypatch):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(math.nan)
    )
    with pytest.raises(DivergedError, match="base: the gradient norm is nan"):
        demo.pretrain(demo.Demo(demo.DemoConfig(quick=True), demo.QUICK, demo.make_tokenizer()))


def test_gradient_norm_without_a_limit_reads_only():
    from accelerate import Accelerator

    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    accelerator = Accelerator(cpu=True)
    assert gradient_norm(accelerator, model, 0).item() == 5.0
    assert torch.equal(model.weight.grad, torch.tensor([[3.0, 4.0]]))
    assert gradient_norm(accelerator, model, 1.0).item() == 5.0
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
