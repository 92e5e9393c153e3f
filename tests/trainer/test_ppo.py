"""Stage 3: PPO."""

from __future__ import annotations

import copy
import json

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import LMHead
from rlhf_trainer import ppo
from rlhf_trainer.cli import main
from rlhf_trainer.config import ConfigError, DataError
from rlhf_trainer.model import save_model
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.scalar import ScalarModel, score_responses

PROMPTS = ["say a", "say b twice c", "good", "say d e f a"]


def count_good(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of good words, of five: a reward that a policy finds within a few iterations."""
    return [response.split().count("good") / 5 for response in responses]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ppo_raises_the_reward(ppo_config, make_model, tokenizer, same_weights, kind):
    policy = make_model(kind)
    start = {name: weight.clone() for name, weight in policy.state_dict().items()}
    result = train_ppo(
        ppo_config(episodes=64 * 15, batch_size=64, minibatches=4, micro_batch_size=16, kl_coef=0),
        policy=policy,
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    scores = [row["score"] for row in result.history]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > scores[0] + 0.3
    assert result.history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert result.history[-1]["kl"] > 0.5
    assert result.history[-1]["entropy"] < result.history[0]["entropy"]
    saved = AutoModelForCausalLM.from_pretrained(result.folder)
    assert same_weights(saved, result.policy)
    assert result.policy is policy
    assert any(not torch.equal(start[name], w) for name, w in policy.state_dict().items())


def test_kl_penalty_holds_the_policy_back(ppo_config, make_model, tokenizer):
    kl = {}
    for coefficient in (0.0, 1.0):
        result = train_ppo(
            ppo_config(f"kl-{coefficient}", episodes=64 * 10, batch_size=64, micro_batch_size=32,
                       kl_coef=coefficient),
            policy=make_model(), tokenizer=tokenizer, reward_fn=count_good, prompts=PROMPTS,
        )  # fmt: skip
        kl[coefficient] = result.history[-1]["kl"]
    assert kl[1.0] < 0.5 * kl[0.0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ratio_is_exactly_one_in_the_first_optimiser_step(
    ppo_config, make_model, tokenizer, kind, backend
):
    """Micro-batches of 3 do not divide minibatches of 8, responses end early, dropout is in the
    model, and the temperature is not 1: k3 of old against new is 0 only where every ratio is 1."""
    result = train_ppo(
        ppo_config(micro_batch_size=3, backend=backend, temperature=0.7, learning_rate=1e-2),
        policy=make_model(kind),
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    assert [row["first_approx_kl"] for row in result.history] == [0.0] * 4
    assert all(row["approx_kl"] > 0 for row in result.history)


def test_first_ratio_is_one_although_no_model_is_batch_invariant(ppo_config, make_model, tokenizer):
    """Here a row's hidden states depend openly on its micro-batch, as the last bits of a matrix
    product do: only old log-probabilities from the very same micro-batches give a ratio of 1."""
    policy = make_model()
    policy.transformer.ln_f.register_forward_hook(lambda module, args, x: x * (1 + x.mean()))
    result = train_ppo(
        ppo_config(micro_batch_size=3, episodes=32),
        policy=policy,
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    assert [row["first_approx_kl"] for row in result.history] == [0.0, 0.0]


def without_special_tokens(model):
    """Ban <pad> and <unk>, so that a response's text gives back its token ids."""
    banned = torch.zeros(13).index_fill(0, torch.tensor([0, 2]), float("-inf"))
    model.lm_head.bias = torch.nn.Parameter(banned, requires_grad=False)
    return model


def token_ids(tokenizer, response: str, limit: int) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(response.split())
    return ids if len(ids) == limit else [*ids, tokenizer.eos_token_id]


def test_statistics_are_those_of_plain_log_softmax(ppo_config, make_model, tokenizer):
    """Length, entropy and KL of two iterations, from each response alone and unpadded; in the
    second one the policy has moved away from its reference."""
    policy, temperature, batches, policies = make_model(), 0.7, [], []

    def remember(prompts, responses):
        batches.append((prompts, responses))
        policies.append({name: w.clone() for name, w in policy.state_dict().items()})
        return count_good(prompts, responses)

    result = train_ppo(
        ppo_config(
            temperature=temperature, batch_size=8, episodes=16, learning_rate=1e-2, kl_coef=0.1
        ),
        policy=without_special_tokens(policy),
        tokenizer=tokenizer,
        reward_fn=remember,
        prompts=PROMPTS,
    )
    reference = without_special_tokens(make_model()).eval()
    for row, (prompts, responses), weights in zip(result.history, batches, policies, strict=True):
        assert sorted(prompts) == sorted(PROMPTS * 2)  # two passes over the four prompts
        model = without_special_tokens(make_model()).eval()
        model.load_state_dict(weights)
        kl, sampled, entropy, tokens = 0.0, 0.0, 0.0, 0
        for prompt, response in zip(prompts, responses, strict=True):
            prompt_ids = tokenizer(prompt).input_ids
            ids = token_ids(tokenizer, response, 5)
            logp, logq = (
                (m(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1])
                .double()
                .div(temperature)
                .log_softmax(-1)
                for m in (model, reference)
            )
            p = logp.exp()
            allowed = p > 0
            kl += (p * (logp - logq))[allowed].sum().item()
            entropy -= (p * logp)[allowed].sum().item()
            chosen = torch.arange(len(ids)), torch.tensor(ids)
            sampled += (logp - logq)[chosen].sum().item()
            tokens += len(ids)
        assert row["length"] == pytest.approx(tokens / 8)
        assert row["entropy"] == pytest.approx(entropy / tokens, rel=1e-4)
        assert row["kl"] == pytest.approx(kl / 8, rel=1e-3, abs=1e-6)
        assert row["kl_sampled"] == pytest.approx(sampled / 8, rel=1e-3, abs=1e-6)
        assert row["score"] == pytest.approx(sum(count_good(prompts, responses)) / 8)
        assert row["reward"] == pytest.approx(row["score"] - 0.1 * row["kl_sampled"], abs=1e-5)
    assert result.history[1]["kl"] > 0.01


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_exact_kl_takes_some_positions_at_a_time(make_model, monkeypatch, at_a_time):
    monkeypatch.setattr(ppo, "KL_LOGITS", 13 * at_a_time + 12)
    heads = [LMHead(make_model(seed=k).lm_head.weight, None, 1.0, None) for k in (0, 1)]
    hidden = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    tokens = torch.tensor([[3, 4, -100, 0, -100], [-100, 12, 1, 2, 3]])
    got = ppo.exact_kl(*zip(hidden, heads, strict=True), tokens, temperature=0.7)
    z, ref_z = (
        h.double() @ head.weight.double().t() for h, head in zip(hidden, heads, strict=True)
    )
    for a, b in zip(got, rk.logprob_kl(z, ref_z, tokens, temperature=0.7), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_head_that_needs_logits_is_refused_before_training(ppo_config, make_model, tokenizer):
    policy = make_model()
    policy.lm_head.register_forward_hook(lambda module, args, logits: logits.clamp(max=1.0))
    config = ppo_config()
    with pytest.raises(ConfigError, match="model: what GPT2LMHeadModel does with its logits"):
        train_ppo(config, policy=policy, tokenizer=tokenizer, reward_fn=count_good, prompts=PROMPTS)
    assert not (config.output / "metrics.jsonl").exists()


def test_losses_of_the_first_iteration_by_hand(ppo_config, make_model, tokenizer):
    """Values, shaped rewards, advantages and returns of each response alone, by the recursion."""
    batches: list[tuple[list[str], list[str]]] = []

    def remember(prompts, responses):
        batches.append((prompts, responses))
        return count_good(prompts, responses)

    torch.manual_seed(5)
    value = ScalarModel.from_causal_lm(make_model(seed=3), 0)
    frozen = copy.deepcopy(value).eval()
    gamma, lam = 0.9, 0.8
    result = train_ppo(
        ppo_config(
            episodes=16, minibatches=1, micro_batch_size=3, gamma=gamma, lam=lam,
            whiten_rewards=False, learning_rate=1e-30, value_learning_rate=1e-30,
        ),
        policy=without_special_tokens(make_model()), value=value, tokenizer=tokenizer,
        reward_fn=remember, prompts=PROMPTS,
    )  # fmt: skip
    ((prompts, responses),) = batches
    squares: list[float] = []
    for prompt, response in zip(prompts, responses, strict=True):
        prompt_ids, ids = tokenizer(prompt).input_ids, token_ids(tokenizer, response, 5)
        row = torch.tensor([prompt_ids + ids])
        scores = frozen(row, torch.ones_like(row), torch.arange(row.shape[1])[None])[0].tolist()
        values = scores[len(prompt_ids) - 1 : -1]  # before each response token is chosen
        rewards = [0.0] * (len(ids) - 1) + count_good([prompt], [response])
        advantage, following = 0.0, 0.0
        for t in reversed(range(len(ids))):
            advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
            following = values[t]
            squares.append(advantage**2)  # return - value
    (metrics,) = result.history
    assert metrics["value_loss"] == pytest.approx(0.5 * sum(squares) / len(squares), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # whitened advantages, ratio 1


def test_what_is_left_out_is_counted(ppo_config, make_model, tokenizer, capsys):
    result = train_ppo(
        ppo_config(episodes=20, max_prompt_tokens=3),
        policy=make_model(),
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    assert len(result.history) == 1
    said = "ppo: 2 prompts, 2 dropped (long prompts); 1 iterations of 16 episodes, 4 episodes left"
    assert said in capsys.readouterr().out


def test_missing_eos_rules(ppo_config, make_model, tokenizer):
    rows = {}
    for name, options in {
        "kept": {},
        "replaced": {"missing_eos_score": -1.0},
        "reduced": {"missing_eos_penalty": 0.25},
    }.items():
        result = train_ppo(
            ppo_config(name, episodes=16, kl_coef=0.0, **options),
            policy=make_model(),
            tokenizer=tokenizer,
            reward_fn=lambda prompts, responses: [2.0] * len(prompts),
            prompts=PROMPTS,
        )
        (rows[name],) = result.history
    ended = rows["kept"]["eos_rate"]
    assert 0 < ended < 1
    assert rows["kept"]["reward"] == pytest.approx(2.0)
    assert rows["replaced"]["reward"] == pytest.approx(2.0 * ended - (1 - ended))
    assert rows["reduced"]["reward"] == pytest.approx(2.0 - 0.25 * (1 - ended))
    assert all(row["score"] == pytest.approx(2.0) for row in rows.values())


def test_reward_model_scores_the_response_cut_at_eos(ppo_config, make_model, tokenizer):
    """The same training by a reward function that scores prompt, response and eos on its own."""
    torch.manual_seed(5)
    reward = ScalarModel.from_causal_lm(make_model(seed=3), 0)

    def score(prompts, responses):
        return [
            score_responses(reward, tokenizer, [prompt], [response], eos=len(response.split()) < 5)[
                0
            ]
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    sources: dict[str, dict] = {"model": {"reward": reward}, "function": {"reward_fn": score}}
    histories = [
        train_ppo(
            ppo_config(name, episodes=32),
            policy=without_special_tokens(make_model()),
            tokenizer=tokenizer,
            prompts=PROMPTS,
            value=copy.deepcopy(reward),
            **source,
        ).history
        for name, source in sources.items()
    ]
    for one, two in zip(*histories, strict=True):
        for key in ("score", "reward", "value_loss", "policy_loss", "kl"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


def test_reward_model_of_another_vocabulary(ppo_config, make_model, make_tokenizer, tmp_path):
    """Refused before the run (trl 1674): one from a folder, one in memory that train_reward made,
    and a value function."""
    tokenizer, other = make_tokenizer(), make_tokenizer()
    vocabulary = other.get_vocab() | {"a": 6, "b": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    swapped = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    foreign = ScalarModel.from_causal_lm(make_model(seed=3), 0)
    save_model(foreign, swapped, tmp_path / "folder")
    foreign.tokenizer = swapped
    small = ScalarModel.from_causal_lm(make_model(vocab_size=9), 0)
    options = {"policy": make_model(), "tokenizer": tokenizer, "prompts": PROMPTS}
    config = ppo_config(reward_model=str(tmp_path / "folder"))
    for given, message in (
        ({}, "reward_model: .* token 5 is 'a' here and 'b' there"),
        ({"reward": foreign}, "reward_model: .* token 5 is 'a' here and 'b' there"),
        ({"reward": small}, "at most the 9 tokens of reward_model, got 13"),
        ({"reward_fn": count_good, "value": foreign}, "value: .* token 5 is 'a' here"),
        ({"reward_fn": count_good, "value": small}, "at most the 9 tokens of value, got 13"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_ppo(config, **options, **given)
    assert not (config.output / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="token 5 is 'a' here and 'b' there"):
        score_responses(foreign, tokenizer, ["say a"], ["b"])


def test_another_chat_template_is_said(ppo_config, make_model, make_tokenizer, capsys):
    said = "the reward model was trained with another chat template than the policy's"
    for template in (None, "{{ messages[0].content }}"):
        reward = ScalarModel.from_causal_lm(make_model(seed=3), 0)
        reward.tokenizer = make_tokenizer()
        reward.tokenizer.chat_template = template
        train_ppo(
            ppo_config(str(template)[:4], episodes=16), policy=make_model(), prompts=PROMPTS,
            tokenizer=make_tokenizer(), reward=reward,
        )  # fmt: skip
        assert (said in capsys.readouterr().out) == (template is not None)


def test_stop_ids_of_the_policy_count_as_ended(ppo_config, make_model, tokenizer):
    """With eos_token_id [1, 5] fewer responses are cut, and the saved policy keeps both."""
    rates = {}
    for stops in (1, [1, 5]):
        policy = make_model()
        policy.generation_config.eos_token_id = stops
        result = train_ppo(
            ppo_config(str(stops), episodes=64, batch_size=64), policy=policy, tokenizer=tokenizer,
            reward_fn=count_good, prompts=PROMPTS,
        )  # fmt: skip
        rates[str(stops)] = result.history[0]["eos_rate"]
        saved = AutoModelForCausalLM.from_pretrained(result.folder)
        assert saved.generation_config.eos_token_id == stops
    assert rates["[1, 5]"] > rates["1"] + 0.1


def test_value_function_starts_from_the_reward_model(ppo_config, make_model, tokenizer):
    reward = ScalarModel.from_causal_lm(make_model(seed=3), 0)
    result = train_ppo(
        ppo_config(value_learning_rate=1e-30, episodes=16),
        policy=make_model(),
        tokenizer=tokenizer,
        reward=reward,
        prompts=PROMPTS,
    )
    assert result.value is not reward
    for trained, given in zip(result.value.parameters(), reward.parameters(), strict=True):
        torch.testing.assert_close(trained, given, rtol=0, atol=1e-20)


def test_adaptive_kl_coefficient(ppo_config, make_model, tokenizer):
    result = train_ppo(
        ppo_config(kl_target=6.0, kl_horizon=100, kl_coef=0.1, episodes=48),
        policy=make_model(),
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    # The KL is far below 6: the error is clipped at -0.2 each time.
    factor = 1 - 0.2 * 16 / 100
    expected = [0.1, 0.1 * factor, 0.1 * factor**2]
    assert [row["kl_coef"] for row in result.history] == pytest.approx(expected)


def test_learning_rates_warm_up(ppo_config, make_model, tokenizer):
    result = train_ppo(
        ppo_config(warmup_iterations=2, learning_rate=1e-3),
        policy=make_model(),
        tokenizer=tokenizer,
        reward_fn=count_good,
        prompts=PROMPTS,
    )
    assert [row["lr"] for row in result.history] == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-3])


def test_gradient_accumulation_changes_nothing_but_rounding(ppo_config, make_model, tokenizer):
    rows = []
    for size in (1, 3, 8):
        result = train_ppo(
            ppo_config(f"micro-{size}", episodes=16, inner_epochs=2, micro_batch_size=size),
            policy=make_model(),
            tokenizer=tokenizer,
            reward_fn=count_good,
            prompts=PROMPTS,
        )
        (row,) = result.history
        rows.append(row)
    for key in ("policy_loss", "value_loss", "approx_kl", "clip_frac", "explained_variance"):
        values = [row[key] for row in rows]
        assert values == pytest.approx([values[0]] * 3, rel=1e-3, abs=1e-6), key


def test_reference_backend_gives_the_same_curve(ppo_config, make_model, tokenizer, untimed):
    auto, reference = (
        untimed(
            train_ppo(
                ppo_config(backend, backend=backend),
                policy=make_model(),
                tokenizer=tokenizer,
                reward_fn=count_good,
                prompts=PROMPTS,
            ).history
        )
        for backend in ("auto", "reference")
    )
    for one, two in zip(auto, reference, strict=True):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(
    ppo_config, make_model, tokenizer, interrupt, same_weights, untimed
):
    """Bit for bit: both networks, the sampler's random state, the prompts' order, the adaptive
    coefficient. The reference is the policy as it came in, not as the checkpoint has it."""
    options = {"save_every": 2, "kl_target": 1.0, "kl_horizon": 100, "episodes": 96}
    data = {"tokenizer": tokenizer, "reward_fn": count_good, "prompts": PROMPTS}
    whole = train_ppo(ppo_config("whole", **options), policy=make_model(), **data)
    config = ppo_config("broken", **options)
    with pytest.raises(interrupt.error):
        train_ppo(config, policy=make_model(), on_step=interrupt(5), **data)
    config.resume = True
    resumed = train_ppo(config, policy=make_model(), **data)
    assert same_weights(resumed.policy, whole.policy)
    assert same_weights(resumed.value, whole.value)
    assert untimed(resumed.history) == untimed(whole.history)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([1.0], "expected 16 numbers, one a response, got 1"),
        (torch.zeros(16, 2), "expected a number for response 0 of 16, got tensor"),
        ([0.0] * 5 + [{}] + [0.0] * 10, r"expected a number for response 5 of 16, got \{\}"),
        ([0.0] * 15 + ["0.5"], "expected a number for response 15 of 16, got '0.5'"),
        ([10**400] + [0.0] * 15, "expected a number for response 0 of 16, got 1000"),
        (None, "expected 16 numbers, got None"),
        (1.0, r"expected 16 numbers, got 1\.0"),
    ],
)
def test_reward_fn_must_return_a_number_a_response(ppo_config, make_model, tokenizer, given, error):
    def judge(prompts, responses):
        return given

    config = ppo_config()
    with pytest.raises(ValueError, match=f"^reward_fn judge: {error}"):
        train_ppo(
            config, policy=make_model(), tokenizer=tokenizer, reward_fn=judge, prompts=PROMPTS
        )
    assert (config.output / "metrics.jsonl").read_text() == ""  # before any training


@pytest.mark.parametrize(
    ("judge", "signature"),
    [
        (lambda prompts: [0.0] * 16, r"\(prompts\)"),
        (lambda responses, prompts: [0.0] * 16, r"\(responses, prompts\)"),
        (lambda completions, prompts, **rest: [0.0] * 16, r"\(completions, prompts, \*\*rest\)"),
        (lambda *, prompts, responses: [0.0] * 16, r"\(\*, prompts, responses\)"),
    ],
)
def test_reward_fn_must_take_prompts_and_then_responses(
    ppo_config, make_model, tokenizer, judge, signature
):
    with pytest.raises(ConfigError, match=f"prompts and responses, got one with {signature}$"):
        train_ppo(
            ppo_config(),
            policy=make_model(),
            tokenizer=tokenizer,
            reward_fn=judge,
            prompts=PROMPTS,
        )


def test_reward_fn_may_return_any_kind_of_numbers(ppo_config, make_model, tokenizer):
    kinds = [
        lambda prompts, responses: tuple(count_good(prompts, responses)),
        lambda prompts, responses: torch.tensor(count_good(prompts, responses)),
        lambda prompts, responses: [torch.tensor(x) for x in count_good(prompts, responses)],
        lambda prompts, responses: numpy.float32(count_good(prompts, responses)),
    ]
    data = {"tokenizer": tokenizer, "prompts": PROMPTS}
    scores = [
        train_ppo(
            ppo_config(f"kind-{k}", episodes=16), policy=make_model(), reward_fn=kind, **data
        ).history[0]["score"]
        for k, kind in enumerate(kinds)
    ]
    assert scores == [scores[0]] * 4


ROWS = [
    {"prompt": "say a", "answer": "a", "weight": 2},
    {"prompt": "say b twice c", "answer": "b"},
]


def test_reward_fn_gets_the_columns_that_it_takes(ppo_config, make_model, tokenizer, write_lines):
    seen: list[dict] = []
    answers, weights = {"say a": "a", "say b twice c": "b"}, {"say a": 2, "say b twice c": None}

    def check(prompts, responses, answer, weight=1):
        assert answer == [answers[prompt] for prompt in prompts]
        assert weight == [weights[prompt] for prompt in prompts]
        return count_good(prompts, responses)

    def check_all(prompts, responses, **columns):
        assert columns.keys() == {"answer", "weight"}
        return check(prompts, responses, **columns)

    def only_one(prompts, responses, *, answer, other=7):
        assert answer == [answers[prompt] for prompt in prompts] and other == 7
        seen.append({})
        return count_good(prompts, responses)

    path = write_lines("prompts.jsonl", ROWS)
    for k, function in enumerate((check, check_all, only_one, count_good)):
        for prompts in (ROWS, None):
            train_ppo(
                ppo_config(f"{k}-{prompts is None}", episodes=16, prompt_file=path),
                policy=make_model(),
                tokenizer=tokenizer,
                reward_fn=function,
                prompts=prompts,
            )
    assert len(seen) == 2


def test_column_that_reward_fn_requires_and_a_prompt_lacks(ppo_config, make_model, tokenizer):
    def needs(prompts, responses, weight):
        return count_good(prompts, responses)

    config, data = ppo_config(), {"policy": make_model(), "tokenizer": tokenizer}
    message = (
        r"prompts\[1\]: missing key 'weight', which reward_fn requires and 1 of 2 prompts lack"
    )
    with pytest.raises(DataError, match=message):
        train_ppo(config, reward_fn=needs, prompts=ROWS, **data)
    with pytest.raises(DataError, match=r"prompts\[0\]: missing key 'weight', .* 4 of 4 prompts"):
        train_ppo(config, reward_fn=needs, prompts=PROMPTS, **data)
    assert not (config.output / "metrics.jsonl").exists()


def test_cut_responses_are_counted_and_said(ppo_config, make_model, tokenizer, capsys):
    config = ppo_config(episodes=32)
    result = train_ppo(
        config, policy=make_model(), tokenizer=tokenizer, reward_fn=count_good, prompts=PROMPTS
    )
    cut = [row["cut"] for row in result.history]
    assert [1 - n / 16 for n in cut] == pytest.approx([row["eos_rate"] for row in result.history])
    assert 0 < sum(cut) < 32
    said = f"ppo: {sum(cut)} of 32 responses were cut at 5 tokens, before their end\n"
    assert said in capsys.readouterr().out


def test_bad_prompts_are_skipped_and_counted(ppo_config, make_model, tokenizer, capsys):
    prompts = [*PROMPTS, {"prompt": ""}, {"prompt": "<eos>"}]
    with pytest.raises(DataError, match=r"prompts\[4\]: prompt: expected text"):
        train_ppo(ppo_config(), policy=make_model(), tokenizer=tokenizer, reward_fn=count_good,
                  prompts=prompts)  # fmt: skip
    train_ppo(
        ppo_config(episodes=16, on_bad_line="skip"), policy=make_model(), tokenizer=tokenizer,
        reward_fn=count_good, prompts=prompts,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "skipped 1 of 6 examples of prompts; the first: prompts[4]: prompt: expected" in said
    assert "skipped 1 of 5 prompts; the first: prompts[5]: prompt: expected text with tok" in said
    assert "ppo: 4 prompts, 1 dropped" in said


def test_bf16_keeps_the_first_ratio_at_one(ppo_config, make_model, tokenizer):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    try:
        result = train_ppo(
            ppo_config(precision="bf16"),
            policy=make_model("llama"),
            tokenizer=tokenizer,
            reward_fn=count_good,
            prompts=PROMPTS,
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [row["first_approx_kl"] for row in result.history] == [0.0] * 4
    assert result.history[0]["kl_sampled"] == 0  # of the policy against itself
    assert next(result.policy.parameters()).dtype == torch.float32


def test_ppo_from_files_by_the_command_line(tmp_path, write_lines, make_model, tokenizer):
    save_model(make_model(), tokenizer, tmp_path / "sft")
    save_model(ScalarModel.from_causal_lm(make_model(), 0), tokenizer, tmp_path / "reward")
    prompts = write_lines("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    output = tmp_path / "run"
    main(
        f"ppo --model {tmp_path}/sft --reward-model {tmp_path}/reward --prompt-file {prompts} "
        f"--output {output} --episodes 32 --batch-size 8 --minibatches 2 --max-response-tokens 4 "
        "--device cpu --no-progress".split()
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == [8, 16, 24, 32]
    kernels = json.loads((output / "kernels.json").read_text())
    assert kernels["steps"] == 2  # the second and the fourth
    AutoModelForCausalLM.from_pretrained(output / "model")
    ScalarModel.load(str(output / "value"))
    assert (output / "curves.png").stat().st_size > 1000
