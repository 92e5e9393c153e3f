"""Loading, the scalar head, sampling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from rlhf_trainer.config import ConfigError
from rlhf_trainer.data import Encoded, collate, left_pad, positions
from rlhf_trainer.model import (
    check_length,
    checked_tokenizer,
    completion_hidden,
    head_logits,
    load_causal_lm,
    load_tokenizer,
    load_weights,
    save_model,
    scratch_model,
    set_dropout,
    settle,
    train_tokenizer,
)
from rlhf_trainer.sampling import respond, sample
from rlhf_trainer.scalar import ScalarModel, score_responses, score_rows

KINDS = ["gpt2", "llama", "qwen2"]
ROWS = [Encoded([3, 4, 5], [6, 1]), Encoded([3], [7, 8, 9, 1]), Encoded([3, 4], [1])]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_logit(make_model, kind):
    model = make_model(kind).eval()
    batch = collate(ROWS, 0)
    with torch.no_grad():
        padded = head_logits(*completion_hidden(model, batch))
        for b, row in enumerate(ROWS):
            alone = collate([row], 0)
            logits = head_logits(*completion_hidden(model, alone))[0]
            torch.testing.assert_close(padded[b][batch.labels[b] >= 0], logits)


def test_head_logits_are_the_models_own():
    """With a scale and a softcap that are the model's own affair."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 13}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5)),
        CohereForCausalLM(CohereConfig(**sizes, **heads, logit_scale=0.25)),
    ):
        batch = collate(ROWS, 0)
        with torch.no_grad():
            own = model.eval()(**batch.inputs(), logits_to_keep=batch.columns).logits
            torch.testing.assert_close(head_logits(*completion_hidden(model, batch)), own)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_no_logit(make_model, kind):
    """Position ids start at the first real token; without them GPT-2 sees other positions."""
    model = make_model(kind).eval()
    ids, mask = left_pad([[3, 4], [5, 6, 7, 8, 9]], 0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[0, 3:]
        alone = model(ids[:1, 3:]).logits[0]
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_scalar_model_is_a_stock_classifier(make_model, tokenizer, tmp_path, same_weights, kind):
    lm = make_model(kind)
    model = ScalarModel.from_causal_lm(lm, pad_token_id=0).eval()
    assert torch.equal(model.model.get_input_embeddings().weight, lm.get_input_embeddings().weight)
    save_model(model, tokenizer, tmp_path / "saved")
    scores = score_rows(model, ROWS, 0, 2)

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = collate(ROWS, 0)
    with torch.no_grad():
        logits = stock(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    torch.testing.assert_close(scores, logits)

    again = ScalarModel.load(str(tmp_path / "saved"))
    assert same_weights(again, model)
    other = ScalarModel.from_causal_lm(make_model(kind, seed=1), 0)
    load_weights(other, tmp_path / "saved")
    assert torch.equal(score_rows(other, ROWS, 0, 2), scores)


def test_scalar_head_starts_with_variance_one_over_d_plus_one(make_model):
    head = ScalarModel.from_causal_lm(make_model(n_embd=512), 0).model.score.weight
    assert head.var().item() == pytest.approx(1 / 513, rel=0.2)  # 512 draws: 6 % standard error


def test_score_is_read_at_the_last_valid_token(make_model):
    """With pad == eos, an eos or its absence at the end still decides which token is scored."""
    model = ScalarModel.from_causal_lm(make_model(), 1).eval()
    rows = [Encoded([3, 4], [5, 1]), Encoded([3, 4], [5]), Encoded([3], [4, 5, 6, 7])]
    scores = score_rows(model, rows, 1, 3)
    for row, score in zip(rows, scores, strict=True):
        ids = torch.tensor([row.prompt + row.response])
        hidden = model.model.base_model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(score, model.model.score(hidden)[0])
    assert not torch.isclose(scores[0], scores[1])


def test_score_responses(make_model, tokenizer):
    model = ScalarModel.from_causal_lm(make_model(), 0)
    rows = [Encoded([3, 5], [6, 7, 1]), Encoded([4], [6])]
    scores = score_rows(model, rows, 0, 2).tolist()
    assert score_responses(model, tokenizer, ["say a"], ["b c"]) == pytest.approx(scores[:1])
    cut = score_responses(model, tokenizer, ["twice"], ["b"], eos=False)
    assert cut == pytest.approx(scores[1:])


def test_scalar_model_names_what_is_not_a_reward_model(make_model, tokenizer, tmp_path):
    save_model(make_model(), tokenizer, tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"expected a sequence classifier in .*GPT2LMHeadModel"):
        ScalarModel.load(str(tmp_path / "lm"))
    with pytest.raises(ConfigError, match="expected a sequence classifier with one label"):
        ScalarModel(make_model())


def fixed_logits(model, logits):
    """The model with the same next-token logits everywhere."""
    model.lm_head.register_forward_hook(lambda *args: logits.expand_as(args[2]))
    return model


def test_sampling_is_from_the_whole_distribution(make_model, tokenizer):
    """What the model's generation settings say about truncation does not reach the rollouts."""
    probability = torch.full((13,), 0.01 / 11)
    probability[6], probability[7] = 0.69, 0.30
    model = fixed_logits(make_model(), probability.log())
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 3.0
    torch.manual_seed(0)
    # 6 is in the prompt, where a repetition penalty would act on it.
    samples = sample(model, tokenizer, [[3, 6]] * 4000, max_response_tokens=1, batch_size=1000)
    counts = torch.bincount(samples.tokens.flatten(), minlength=13) / 4000
    # Six standard errors of a share of 0.3 in 4000 draws.
    assert counts[7].item() == pytest.approx(0.30, abs=6 * (0.3 * 0.7 / 4000) ** 0.5)
    assert 0 < 1 - counts[6] - counts[7] < 0.03
    assert model.generation_config.top_k == 1  # given back


def test_temperature_of_sampling(make_model, tokenizer):
    model = fixed_logits(make_model(), torch.tensor([2.0, 1.0] + [-50.0] * 11))
    torch.manual_seed(0)
    samples = sample(
        model, tokenizer, [[3]] * 4000, max_response_tokens=1, temperature=0.5, batch_size=4000
    )
    share = (samples.tokens == 0).float().mean().item()
    expected = torch.sigmoid(torch.tensor(2.0)).item()  # logits / 0.5 differ by 2
    assert share == pytest.approx(expected, abs=6 * (expected * (1 - expected) / 4000) ** 0.5)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_samples_end_at_the_first_eos(make_model, make_tokenizer, pad):
    tokenizer = make_tokenizer(pad)
    probability = torch.full((13,), 0.5 / 12)
    probability[1] = 0.5
    model = fixed_logits(make_model(), probability.log())
    torch.manual_seed(0)
    prompts = [[3], [3, 4, 5]] * 20
    samples = sample(model, tokenizer, prompts, max_response_tokens=4, batch_size=7)
    assert samples.prompt_width == 3
    assert samples.attention_mask[:, :3].sum(1).tolist() == [1, 3] * 20
    assert 0 < samples.ended.sum() < 40
    for row, ended, mask in zip(samples.responses(), samples.ended, samples.mask, strict=True):
        assert row.count(1) == int(ended)
        assert (row[-1] == 1) if ended else (len(row) == 4)
        assert mask.tolist() == [True] * len(row) + [False] * (samples.mask.shape[1] - len(row))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_do_not_depend_on_the_batch(make_model, tokenizer, kind):
    model = make_model(kind)
    prompts = ["say a", "say", "twice a b c d e f", "f e d"]
    options = {"max_response_tokens": 6, "temperature": 0}
    together = respond(model, tokenizer, prompts, **options)
    alone = [respond(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert [r.ids for r in together] == [r.ids for r in alone]


def test_respond_with_a_seed_leaves_the_random_state_alone(make_model, tokenizer):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    options = {"max_response_tokens": 4, "seed": 5}
    one = respond(make_model(), tokenizer, ["say a"] * 3, **options)
    torch.manual_seed(3)
    two = respond(make_model(), tokenizer, ["say a"] * 3, **options)
    torch.manual_seed(3)
    assert one == two
    respond(model := make_model(), tokenizer, ["say a"], max_response_tokens=4)
    torch.manual_seed(3)
    respond(model, tokenizer, ["say a"], **options)
    assert torch.equal(torch.rand(1), expected)


def test_dropout_is_set_on_the_residual_path_alone(make_model):
    model = make_model(attn_pdrop=0.3, resid_pdrop=0.1, embd_pdrop=0.1)
    set_dropout(model, 0.25)
    block = model.transformer.h[0]
    assert block.attn.attn_dropout.p == 0.0
    assert block.attn.resid_dropout.p == block.mlp.dropout.p == model.transformer.drop.p == 0.25


def test_tokenizers(tmp_path, tokenizer):
    trained = train_tokenizer(["say a\n\nHuman: hé"] * 3, 300)
    assert trained.decode(trained("hé say 猫").input_ids) == "hé say 猫"
    assert trained.pad_token_id != trained.eos_token_id
    assert load_tokenizer(None, "scratch:gpt2-tiny") is None
    tokenizer.save_pretrained(tmp_path)
    named = load_tokenizer(str(tmp_path), "scratch:gpt2-tiny")
    assert named is not None
    assert named.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="model: expected a folder"):
        load_tokenizer(None, None)
    tokenizer.pad_token = None
    assert checked_tokenizer(tokenizer).pad_token == "<eos>"
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="expected one with an eos_token"):
        checked_tokenizer(tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_model_folder_without_a_tokenizer(tmp_path, make_model, kind):
    """transformers makes one without words for GPT-2, and raises for Llama."""
    make_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: (expected one in|cannot load one from) /"):
        load_tokenizer(None, str(tmp_path))


@pytest.fixture
def without(make_model, tokenizer, tmp_path):
    """without(*names): a folder with a Llama whose weights lack these tensors, or all of them in
    one of two files; changed: tensors in place of its own."""

    def make(*names: str, changed: dict | None = None, kind: str = "llama"):
        save_model(make_model(kind), tokenizer, tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = {**load_file(path), **(changed or {})}
        save_file({k: t for k, t in tensors.items() if k not in names}, path, {"format": "pt"})
        return str(tmp_path)

    return make


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_weights_are_refused_by_name(without, make_model, tokenizer):
    """transformers draws them at random, in silence."""
    folder = without(NORM, "lm_head.weight")
    named = r"got no tensor for lm_head.weight, model.layers.1.input_layernorm.weight$"
    with pytest.raises(ConfigError, match=r"model: expected the weights of LlamaFor.*" + named):
        load_causal_lm(folder, tokenizer)
    with pytest.raises(ConfigError, match=r"checkpoint: expected the weights of .*" + named):
        load_weights(make_model("llama"), Path(folder))
    folder = without(changed={NORM: torch.ones(31)})
    with pytest.raises(ConfigError, match=r"another shape for .* \(\[31\] in place of \[32\]\)"):
        load_causal_lm(folder, tokenizer)


def test_tied_weights_are_not_missing(without, tokenizer):
    load_causal_lm(without(kind="gpt2"), tokenizer)


def test_tensors_without_a_place(without, make_model, tokenizer, capsys):
    """A model may hold more than its text part; a checkpoint of our own may not."""
    folder = without(changed={"vision.weight": torch.ones(3)})
    load_causal_lm(folder, tokenizer)
    assert "model: vision.weight of " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"got no place for vision\.weight"):
        load_weights(make_model("llama"), Path(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_is_no_causal_language_model(make_model, tokenizer, tmp_path, kind):
    save_model(ScalarModel.from_causal_lm(make_model(kind), 0), tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"expected a causal language model in .*SequenceClass"):
        load_causal_lm(str(tmp_path), tokenizer)


def test_a_missing_file_of_weights(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ConfigError, match=r"model: (cannot load one|expected the weights)"):
        load_causal_lm(str(tmp_path), tokenizer)


def test_a_reward_model_without_its_head(make_model, tokenizer, tmp_path):
    save_model(ScalarModel.from_causal_lm(make_model(), 0), tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if k != "score.weight"}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"reward_model: .* got no tensor for score.weight"):
        ScalarModel.load(str(tmp_path))
    head = {"score.bias": torch.ones(1)}  # which transformers leaves out of the score
    save_file({**tensors, **head}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"reward_model: .* got no place for score.bias"):
        ScalarModel.load(str(tmp_path))


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_saved_files_have_the_mode_that_the_umask_leaves(make_model, tokenizer, tmp_path, mask):
    before = os.umask(mask)
    try:
        save_model(make_model(), tokenizer, tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert "model.safetensors" in modes


def test_settings_that_cannot_be_saved_are_found_before_training(make_model, tokenizer):
    model = make_model()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    with pytest.raises(ConfigError, match=r"model: expected settings that .*temperature.*0\.6"):
        settle(model, tokenizer)


def test_saved_models_stop_where_they_were_taught_to(make_model, tokenizer, tmp_path):
    """Stop ids of the model stay, and the tokenizer's eos joins them."""
    for own, kept in (([1, 5], [1, 5]), (1, 1), (5, [5, 1]), (None, 1), ([5, 6], [5, 6, 1])):
        model = make_model()
        model.generation_config.eos_token_id = own
        settle(model, tokenizer)
        save_model(model, tokenizer, tmp_path)
        assert load_causal_lm(str(tmp_path), tokenizer).generation_config.eos_token_id == kept


def test_tokenizer_of_another_model(make_model, make_tokenizer, tmp_path):
    save_model(make_model(), make_tokenizer(), tmp_path / "model")
    make_tokenizer("<eos>").save_pretrained(tmp_path / "same")
    load_tokenizer(str(tmp_path / "same"), str(tmp_path / "model"))
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"tokenizer: expected the ids of model .*: they split"):
        load_tokenizer(str(tmp_path / "other"), str(tmp_path / "model"))
    make_model().save_pretrained(tmp_path / "bare")  # nothing beside it to compare with
    load_tokenizer(str(tmp_path / "other"), str(tmp_path / "bare"))


def test_damaged_model_folder_is_named_in_one_line(tmp_path, make_model, tokenizer):
    save_model(make_model(), tokenizer, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"model: cannot load one from /.*\Z") as caught:
        load_causal_lm(str(tmp_path), tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="checkpoint: cannot load one from /"):
        load_weights(make_model(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="reward_model: cannot load one from /"):
        ScalarModel.load(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_scratch_models(tokenizer, same_weights, name):
    model = load_causal_lm(f"scratch:{name}", tokenizer, seed=1)
    assert model.config.vocab_size == len(tokenizer)
    assert same_weights(model, scratch_model(name, tokenizer, seed=1))
    assert not same_weights(model, scratch_model(name, tokenizer, seed=2))
    with pytest.raises(ConfigError, match="expected scratch:gpt2-tiny or"):
        scratch_model("gpt9", tokenizer)


def test_sizes_that_do_not_fit(make_model, tokenizer, tmp_path):
    model = make_model()
    check_length(model, 64)
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got one of 65"):
        check_length(model, 65)
    save_model(model, tokenizer, tmp_path)
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ConfigError, match="expected at most the 13 tokens of model"):
        load_causal_lm(str(tmp_path), tokenizer)
