"""Chats: one rendering for all stages."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from rlhf_trainer.chat import read_transcript, render_turn, turn_end
from rlhf_trainer.config import DataError
from rlhf_trainer.data import (
    Encoded,
    comparison,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    read_demonstrations,
    read_prompts,
    read_rankings,
)

TEMPLATE = (
    "good {% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
QUESTION = [
    {"role": "user", "content": "say a"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "say b"},
]
TRANSCRIPT = "\n\nHuman: say a\n\nAssistant: a\n\nHuman: say b\n\nAssistant:"


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def chat_tokenizer(tokenizer):
    """Texts open with a bos, which the template writes itself, and turns close with a token that is
    not eos."""
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|start|>", "<|end|>")])
    tokenizer.bos_token, tokenizer.chat_template = "good", TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="good $A", special_tokens=[("good", 11)]
    )
    return tokenizer


def comparison_lines() -> dict[str, dict]:
    """One comparison in every form that a line may have."""
    return {
        "messages and text": {"messages": QUESTION, "chosen": "b", "rejected": "b b"},
        "messages": {"messages": QUESTION, "chosen": answer("b"), "rejected": answer("b b")},
        "prompt as messages": {"prompt": QUESTION, "chosen": answer("b"), "rejected": "b b"},
        "whole chats": {"chosen": QUESTION + answer("b"), "rejected": QUESTION + answer("b b")},
        "whole chats beside a prompt": {
            "prompt": "say b",
            "chosen": QUESTION + answer("b"),
            "rejected": QUESTION + answer("b b"),
        },
        "transcripts": {"chosen": f"{TRANSCRIPT} b", "rejected": f"{TRANSCRIPT} b b"},
        "ranked": {"messages": QUESTION, "completions": ["b b", answer("b")], "ranks": [2, 1]},
    }


@pytest.mark.parametrize("form", comparison_lines())
@pytest.mark.parametrize("template", [True, False])
def test_all_stages_see_the_same_tokens(write_lines, chat_tokenizer, form, template):
    """What SFT trains on, what the reward model scores and what PPO continues."""
    if not template:
        chat_tokenizer.chat_template = None
    sft = write_lines("sft.jsonl", [{"messages": QUESTION + answer("b")}])
    ranked = write_lines("reward.jsonl", [comparison_lines()[form]])
    prompts = write_lines("ppo.jsonl", [{"messages": QUESTION}, {"prompt": QUESTION}])
    (trained,) = encode_demonstrations(chat_tokenizer, read_demonstrations(sft, chat_tokenizer), 9)
    (scored,) = encode_rankings(chat_tokenizer, read_rankings(ranked, chat_tokenizer), 9)
    continued = encode_prompts(chat_tokenizer, read_prompts(prompts, chat_tokenizer))
    assert trained == scored.rows[0]
    assert continued == [trained.prompt] * 2
    if template:
        start, end = chat_tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
        good, say, a, b, unk = chat_tokenizer.convert_tokens_to_ids(["good", "say", "a", "b", "x"])
        turns = [[unk, say, a], [unk, a], [unk, say, b]]  # a role is no word that it knows
        body = [token for turn in turns for token in (start, *turn, end)]
        assert trained == Encoded([good, *body, start, unk], [b, end])  # one bos, one end, no eos
        assert scored.rows[1].response == [b, b, end]
    else:
        assert trained.response == chat_tokenizer.convert_tokens_to_ids(["b", "<eos>"])
        assert trained.prompt.count(11) == 1


def test_plain_text_is_taken_as_it_is_in_every_stage(write_lines, chat_tokenizer):
    row = {"prompt": "say b", "response": "b", "chosen": "b", "rejected": "a"}
    path = write_lines("plain.jsonl", [row])
    (trained,) = encode_demonstrations(chat_tokenizer, read_demonstrations(path, chat_tokenizer), 9)
    (scored,) = encode_rankings(chat_tokenizer, read_rankings(path, chat_tokenizer), 9)
    assert trained == scored.rows[0] == Encoded([11, 3, 6], [6, 1])
    assert encode_prompts(chat_tokenizer, read_prompts(path, chat_tokenizer)) == [[11, 3, 6]]


def test_transcripts_are_chats(chat_tokenizer, write_lines):
    assert read_transcript(TRANSCRIPT, "chosen") == QUESTION
    assert read_transcript(f"{TRANSCRIPT} b\n", "chosen") == QUESTION + answer("b")
    # Two turns of one speaker are one: templates want turns that alternate.
    said = read_transcript("\n\nHuman: say\n\nHuman: a\n\nAssistant: b", "chosen")
    assert said == [{"role": "user", "content": "say\n\na"}, *answer("b")]
    # The first answers differ, further turns follow.
    rows = [{"chosen": f"{TRANSCRIPT} b", "rejected": "\n\nHuman: say a\n\nAssistant: c"}]
    (ranking,) = read_rankings(write_lines("data.jsonl", rows), chat_tokenizer)
    prompt, response = render_turn(QUESTION[:1], QUESTION[1:] + answer("b"), chat_tokenizer)
    assert ranking == comparison(prompt, response, "c<|end|>\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": QUESTION, "chosen": "b"}, "missing key 'rejected'"),
        ({"messages": QUESTION, "chosen": "b", "rejected": []}, "rejected: expected a list of one"),
        ({"messages": QUESTION, "chosen": "b", "rejected": 3}, "rejected: expected a string, got"),
        (
            {"messages": QUESTION, "chosen": QUESTION, "rejected": "b"},
            "chosen: expected the last one from the assistant, got one from 'user'",
        ),
        (
            {"messages": QUESTION + answer("b"), "chosen": "b", "rejected": "c"},
            "messages: expected the last one before the assistant's turn",
        ),
        (
            {"messages": QUESTION, "chosen": "b", "rejected": " "},
            r"rejected\[0\].content: expected",
        ),
        ({"prompt": "say b", "chosen": answer("b"), "rejected": "b"}, "chosen: expected a string"),
        (
            {"messages": QUESTION, "completions": ["b", answer("")], "ranks": [1, 2]},
            r"completions\[1\]\[0\].content: expected an answer",
        ),
        ({"chosen": QUESTION + answer("b"), "rejected": answer("b")}, "expected chats that share"),
        ({"chosen": "say b", "rejected": "say c"}, "chosen: expected a transcript that opens with"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "chosen: expected the last one from the"),
    ],
)
def test_bad_chats_name_file_line_and_fault(write_lines, chat_tokenizer, line, message):
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{message}"):
        read_rankings(write_lines("data.jsonl", [line]), chat_tokenizer)


def test_the_end_of_a_turn(chat_tokenizer):
    assert turn_end(chat_tokenizer) == "<|end|>"
    chat_tokenizer.chat_template = "{{ raise_exception('no system prompt') }}"
    assert turn_end(chat_tokenizer) == ""
    chat_tokenizer.chat_template = None
    assert turn_end(chat_tokenizer) == ""
