"""What token ids mean: stop ids, pad tokens, tokenizers that agree."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_trainer.sampling import respond, sample
from rlhf_trainer.tokens import closing_ids, conflict, own_pad, stop_ids, token_count

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """Whose template closes a turn with a token of its own, which is not eos."""
    special = [AddedToken(text, special=True) for text in ("<|start|>", "<|end|>")]
    tokenizer.add_tokens(special)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_turns_close_with_the_templates_token(tokenizer, chat_tokenizer, make_model):
    assert closing_ids(chat_tokenizer) == [1, 14]
    assert stop_ids(make_model(), chat_tokenizer) == [1, 14]
    chat_tokenizer.chat_template = "{{ messages[5].content }}"  # which no short chat fits
    assert closing_ids(chat_tokenizer) == [1]


def test_list_of_eos_ids(make_model, tokenizer):
    """All of generation_config's eos_token_id: [1, 5] end a response (trl 7039)."""
    probability = torch.full((13,), 0.4 / 11)
    probability[1] = probability[5] = 0.3
    model = make_model()
    model.lm_head.register_forward_hook(lambda m, a, out: probability.log().expand_as(out))
    model.generation_config.eos_token_id = [1, 5]
    torch.manual_seed(0)
    samples = sample(model, tokenizer, [[3], [3, 4]] * 40, max_response_tokens=3)
    last = [row[-1] for row in samples.responses()]
    assert samples.ended.tolist() == [token in (1, 5) for token in last]
    assert {1, 5} < set(last)  # both kinds, and some that were cut
    for row in samples.responses():
        assert not {1, 5} & set(row[:-1])
    # What stopped a response is no part of its text, special token or not.
    answers = respond(model, tokenizer, ["say"] * 80, max_response_tokens=3, seed=1)
    stopped = [a for a in answers if a.ids[-1] == 5]
    assert stopped
    assert all(a.ended and tokenizer.decode([5]) not in a.text.split() for a in stopped)
    assert model.generation_config.eos_token_id == [1, 5]


def test_own_pad_ends_no_text(tokenizer, make_tokenizer):
    same = own_pad(tokenizer, [1])
    assert same is not tokenizer
    assert (same.pad_token_id, same.padding_side) == (0, "right")
    assert own_pad(make_tokenizer("<eos>"), [1]).pad_token_id == 0  # there is a free one
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<eos>", eos_token="<eos>", unk_token="<unk>"
    )
    padded = own_pad(bare, [0])
    assert padded.pad_token_id == 3 == token_count(bare)
    assert bare.pad_token_id == 0
    assert conflict(bare, padded) is conflict(padded, bare) is None


def test_conflicts_between_tokenizers(make_tokenizer):
    ours = make_tokenizer()
    assert conflict(ours, make_tokenizer("<eos>")) is None  # pad tokens are in no text
    larger = make_tokenizer()
    larger.add_tokens(["extra"])
    assert conflict(ours, larger) is None
    assert conflict(larger, ours) == "token 13 is 'extra' here and None there"
    assert conflict(larger, ours, extra=True) is None
    swapped = ours.get_vocab() | {"a": 6, "b": 5}
    words = Tokenizer(models.WordLevel(swapped, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    for extra in (False, True):
        assert conflict(ours, other, extra=extra) == "token 5 is 'a' here and 'b' there"
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert conflict(ours, lower) == "they split text in different ways"
