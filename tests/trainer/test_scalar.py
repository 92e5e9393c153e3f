"""The scalar head, and what transformers makes of a saved one."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from rlhf_trainer.config import ConfigError
from rlhf_trainer.data import Demonstration, Encoded, encode_demonstrations, left_pad
from rlhf_trainer.model import save_model
from rlhf_trainer.reward import train_reward
from rlhf_trainer.scalar import ScalarModel, center_scores, flattest_direction, score_rows
from rlhf_trainer.tokens import own_pad

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 13}
CONFIGS = {
    "gpt_neox": lambda: GPTNeoXConfig(**HEADS, intermediate_size=64),
    "opt": lambda: OPTConfig(**HEADS, ffn_dim=64, word_embed_proj_dim=32),
    "gemma2": lambda: Gemma2Config(
        **HEADS, intermediate_size=64, num_key_value_heads=1, head_dim=16
    ),
}


@pytest.fixture
def without_pad():
    """A tokenizer like GPT-2's: eos is all there is to pad with."""
    names = ["<unk>", "<eos>", "say", "twice", "a", "b", "c", "d", "e", "f", "good", "bad", "x"]
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<eos>", eos_token="<eos>", unk_token="<unk>"
    )


def stock_scores(folder, rows, side):
    """Scores of a padded batch in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": [r.prompt + r.response for r in rows]}, return_tensors="pt")
    mask = batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    options = {} if model.config.model_type == "opt" else {"position_ids": places}
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=mask, **options).logits[:, 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", *CONFIGS])
def test_scoring_position_when_pad_is_eos(make_model, without_pad, tmp_path, kind, side):
    """A saved reward model scores in transformers what it scored here, the mean of 0 included
    (transformers 35352, 35909: the position before an eos that pads as well)."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[kind]()) if kind in CONFIGS else make_model(kind)
    tokenizer = own_pad(without_pad, [1])
    model = ScalarModel.from_causal_lm(lm, tokenizer.pad_token_id).eval()
    generator = torch.Generator().manual_seed(1)
    rows = [
        Encoded(torch.randint(2, 13, (p,), generator=generator).tolist(), [*range(4, 4 + r), 1])
        for p in (1, 2, 5) for r in (0, 1, 3, 4)
    ]  # fmt: skip
    rows.append(Encoded([3, 4], [5]))  # one that was cut
    before = score_rows(model, rows, 1, 4)
    center_scores(model, rows[:8], rows, 1, 4)
    scores = score_rows(model, rows, 1, 4)
    assert scores[:8].mean().item() == pytest.approx(0, abs=1e-6)
    assert abs(before[:8].mean().item()) > 1e-3
    shift = scores - before
    if kind in ("gpt2", "opt", "gpt_neox"):  # a LayerNorm: a constant
        torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-5)
    else:
        assert torch.corrcoef(torch.stack([scores, before]))[0, 1] > 0.9
    save_model(model, tokenizer, tmp_path)
    torch.testing.assert_close(stock_scores(tmp_path, rows, side), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_trained_reward_model_is_whole_without_the_trainer(
    reward_config, make_model, make_tokenizer, pairs, kind
):
    result = train_reward(
        reward_config(epochs=3), model=make_model(kind), tokenizer=make_tokenizer("<eos>"),
        train=pairs, heldout=pairs[:4],
    )  # fmt: skip
    examples = [Demonstration("say b", text) for text in ("a good", "a a bad", "b")]
    rows = encode_demonstrations(result.tokenizer, examples, 8)
    here = score_rows(result.model, rows, result.tokenizer.pad_token_id, 2)
    for side in ("right", "left"):
        there = stock_scores(result.folder, rows, side)
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    assert result.tokenizer.pad_token_id not in (1, None)


def test_the_flattest_direction_moves_all_rows_alike():
    """Rows whose differences lie in one plane: along the rest of their mean they do not differ."""
    torch.manual_seed(0)
    plane, offset = torch.randn(2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    hidden = torch.randn(500, 2, dtype=torch.float64) @ plane + offset
    direction = flattest_direction(hidden, hidden.mean(0))
    moved = hidden @ direction
    assert moved.mean().item() == pytest.approx(1)
    assert moved.std() < 0.05 * (hidden @ (offset / offset.square().sum())).std()
    one = hidden[:1]  # with no differences at all it is the row itself
    torch.testing.assert_close(flattest_direction(one, one[0]), one[0] / one[0].square().sum())


@pytest.mark.parametrize(
    "config",
    [
        lambda: CohereConfig(**HEADS, num_key_value_heads=1, intermediate_size=64),
        lambda: GraniteConfig(**HEADS, num_key_value_heads=1, intermediate_size=64),
        lambda: MambaConfig(vocab_size=13, hidden_size=32, num_hidden_layers=1, state_size=4),
    ],
)
def test_models_without_a_classifier_are_named(reward_config, tokenizer, pairs, config):
    model = AutoModelForCausalLM.from_config(config())
    name = type(model).__name__
    with pytest.raises(ConfigError, match=rf"transformers has a sequence classifier, got {name}"):
        train_reward(reward_config(), model=model, tokenizer=tokenizer, train=pairs)
    assert not (reward_config().output / "metrics.jsonl").exists()


def test_an_encoder_is_no_reward_model():
    config = BertConfig(**HEADS, intermediate_size=64, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="head `score` without bias, got BertFor"):
        ScalarModel.from_causal_lm(model, 0)


def test_ids_of_another_tokenizer_are_refused(make_model, make_tokenizer, tmp_path):
    """Of the same size, of a smaller one, and one that ends its texts otherwise."""
    tokenizer, saved = make_tokenizer(), make_tokenizer()
    model = ScalarModel.from_causal_lm(make_model(), 0)
    save_model(model, saved, tmp_path / "same")
    ScalarModel.load(str(tmp_path / "same")).check_ids("reward_model", tokenizer, ["say a"])
    small = ScalarModel.from_causal_lm(make_model(vocab_size=9), 0)
    with pytest.raises(ConfigError, match="expected at most the 9 tokens of reward_model, got 13"):
        small.check_ids("reward_model", tokenizer)
    other = ScalarModel(model.model, make_tokenizer())
    other.tokenizer.eos_token = "f"
    with pytest.raises(ConfigError, match=r"reward_model: .*responses end with '<eos>' here, 'f'"):
        other.check_ids("reward_model", tokenizer)
    opening = ScalarModel(model.model, make_tokenizer())
    opening.tokenizer.bos_token = "good"
    opening.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="good $A", special_tokens=[("good", 11)]
    )
    opening.check_ids("reward_model", tokenizer)
    with pytest.raises(ConfigError, match="the prompt 'say a' has other tokens here than there"):
        opening.check_ids("reward_model", tokenizer, ["say a"])


def test_a_folder_without_a_tokenizer_is_no_reward_model(make_model, tmp_path):
    model = ScalarModel.from_causal_lm(make_model(), 0)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer: expected one in"):
        ScalarModel.load(str(tmp_path))


def test_padding_with_a_token_of_its_own(make_model):
    """The embedding grows by the row that it lacks, and no score changes."""
    lm = make_model()
    rows = [Encoded([3, 4], [5, 1]), Encoded([3], [1])]
    torch.manual_seed(3)
    small = ScalarModel.from_causal_lm(lm, 1)
    scores = score_rows(small, rows, 1, 2)
    small.set_pad(13)
    assert small.model.get_input_embeddings().weight.shape[0] == 14 == small.model.config.vocab_size
    torch.testing.assert_close(score_rows(small, rows, 13, 2), scores)
    ids, mask = left_pad([[3, 4, 5, 1], [3, 1]], 13)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        stock = small.model.eval()(ids, attention_mask=mask, position_ids=places).logits[:, 0]
    torch.testing.assert_close(stock, scores)
