"""Data files, tokens and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_trainer.config import DataError
from rlhf_trainer.data import (
    IGNORE,
    Demonstration,
    Encoded,
    Ranking,
    collate,
    comparison,
    count_cut,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_responses,
    left_pad,
    positions,
    read_demonstrations,
    read_prompts,
    read_rankings,
    shuffled,
    split,
)

CHAT = [
    {"role": "user", "content": "say a"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "say b"},
    {"role": "assistant", "content": "b"},
]
GOOD = {"prompt": "say a", "response": "a"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_read_demonstrations(write_lines, name):
    path = write_lines(name, [GOOD, "", {"prompt": "say ü", "response": "ü", "id": 7}])
    assert read_demonstrations(path) == [Demonstration("say a", "a"), Demonstration("say ü", "ü")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "say a"}, "missing key 'response'; the line has 'prompt'"),
        ({"prompt": 3, "response": "a"}, "prompt: expected a string, got int"),
        ({"prompt": "say a", "response": ""}, "response: expected text, got an empty string"),
        ({"messages": []}, "messages: expected a list of one or more"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: expected a string, got None"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"messages\[0\].role: expected system"),
        ("[" * 100_000, "not valid JSON: too many brackets"),
        ('{"prompt": "\\ud800x", "response": "a"}', "prompt: expected Unicode text, got the lone"),
        ('{"prompt": "say a", "response": "\\ud800x"}', "response: expected Unicode text"),
        (
            '{"messages": [{"role": "user", "content": "\\udfff"}]}',
            r"messages\[0\].content: expected Unicode text",
        ),
        ({"messages": [*CHAT[:3], answer("")]}, r"messages\[3\].content: expected an answer, got"),
        ({"messages": [*CHAT[:3], answer(" ")]}, r"messages\[3\].content: expected an answer, got"),
        ({"messages": CHAT[:3]}, "expected the last one from the assistant, got one from 'user'"),
    ],
)
def test_bad_demonstration_names_file_line_and_fault(write_lines, line, message):
    path = write_lines("data.jsonl", [GOOD, line, GOOD])
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        read_demonstrations(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "p", "completions": ["a"], "ranks": [1]},
            "completions: expected a list of two",
        ),
        ({"prompt": "p", "completions": ["a", ""], "ranks": [1, 2]}, r"completions\[1\]"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "ranks: expected a list of 2"),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [1, "2"]},
            r"ranks\[1\]: expected a n",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"]},
            "ranks: expected a list of 2 numbers, got None",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 10**400]},
            r"ranks\[1\]: expected a number that float32 holds, got 10000",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1e39]}, r"ranks\[1\]: expected"),
        (
            '{"prompt": "p", "completions": ["a", "\\ud800"], "ranks": [1, 2]}',
            r"completions\[1\]: expected Unicode text",
        ),
        ('{"chosen": "\\ud800", "rejected": "a"}', "chosen: expected Unicode text"),
        ({"prompt": "p", "chosen": "a"}, "missing key 'rejected'"),
        ({"chosen": "a b", "rejected": "a c"}, "expected transcripts that share a prefix"),
    ],
)
def test_bad_ranking_names_file_line_and_fault(write_lines, line, message):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_lines("data.jsonl", [good, good, line])
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        read_rankings(path)


def test_all_bad_lines_are_counted(write_lines):
    path = write_lines("data.jsonl", [GOOD, *["{"] * 8])
    with pytest.raises(DataError) as caught:
        read_demonstrations(path)
    lines = str(caught.value).splitlines()
    assert [f"{path}:{k}:" in lines[k - 2] for k in range(2, 7)] == [True] * 5
    assert lines[5] == "and 3 more bad lines"
    assert lines[6] == "(--on-bad-line skip leaves them out and counts them)"


KINDS: list[tuple[Any, list[Any]]] = [
    (
        read_demonstrations,
        [
            GOOD,
            "{",
            "[1]",
            {"prompt": "say a"},
            {"prompt": "say a", "response": " \n"},
            {"prompt": "say a", "response": 3},
            {"messages": [*CHAT[:3], answer(" ")]},
        ],
    ),
    (
        read_rankings,
        [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "a", "rejected": "\t"},
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes",
                "rejected": "\n\nHuman: hi\n\nAssistant:",
            },
            {"chosen": "\n\nHuman: hi\n\nAssistant: yes"},
            {"prompt": "p", "completions": ["a", " "], "ranks": [1, 2]},
            {"prompt": "p", "completions": ["a", "b", "a"], "ranks": [1, 2, 3]},
        ],
    ),
    (read_prompts, [{"prompt": "say a"}, {"prompt": ""}, {"messages": CHAT}, "{", '"a"']),
]


@pytest.mark.parametrize(("read", "rows"), KINDS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_kind_of_bad_line_is_named_or_skipped_and_counted(write_lines, capsys, read, rows):
    path = write_lines("data.jsonl", rows)
    for k, row in enumerate(rows[1:]):
        alone = write_lines("one.jsonl", [rows[0], row])
        with pytest.raises(DataError, match=rf"{alone}:2: "):
            read(alone)
        assert len(read(alone, on_bad_line="skip")) == 1, k
    capsys.readouterr()
    assert read(path, on_bad_line="skip") == read(write_lines("good.jsonl", rows[:1]))
    count = len(rows) - 1
    said = f"skipped {count} of {count + 1} examples of {path}; the first: {path}:2: "
    assert capsys.readouterr().out.startswith(said)
    with pytest.raises(DataError, match=rf"{path}:2: "):  # none is left
        read(write_lines("data.jsonl", ["", *rows[1:]]), on_bad_line="skip")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": " "}, "rejected: expected an answer, got blank text"),
        ({"chosen": "a", "rejected": "a"}, "chosen, rejected: expected different answers"),
        (
            {"completions": ["a", "b", "a"], "ranks": [1, 2, 2]},
            r"completions\[0\], completions\[2\]: expected different answers where one is better",
        ),
    ],
)
def test_blank_and_contradictory_answers_are_refused(write_lines, row, message):
    row = {"prompt": "p", **row}
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {message}"):
        read_rankings(write_lines("data.jsonl", [row]))
    with pytest.raises(DataError, match=rf"train\[0\]: {message}"):
        read_rankings([row], name="train")


def test_one_text_twice_at_the_same_rank_is_a_tie(write_lines):
    row = {"prompt": "p", "completions": ["a", "b", "a"], "ranks": [1, 2, 1]}
    assert read_rankings(write_lines("data.jsonl", [row]))[0].ranks == (1, 2, 1)


@pytest.mark.parametrize(("read", "rows"), KINDS, ids=lambda x: getattr(x, "__name__", ""))
def test_dicts_in_memory_are_read_as_lines_are(write_lines, read, rows):
    dicts = [row for row in rows if isinstance(row, dict)]
    (example,) = read([rows[0]])
    assert [example] == read(write_lines("data.jsonl", rows[:1])) == read([example])
    for row in dicts[1:]:
        with pytest.raises(DataError, match=r"^train\[2\]: "):
            read([example, rows[0], row], name="train")
    with pytest.raises(DataError, match=r"^train\[1\]: expected a dict, got int"):
        read([example, 3], name="train")
    assert read([], name="heldout") == []
    with pytest.raises(DataError, match="train: no examples"):
        read([], name="train")


def test_error_of_a_dict_names_index_and_key():
    with pytest.raises(DataError, match=r"^train\[1\]: missing key 'response'; the line has 'pro"):
        read_demonstrations([GOOD, {"prompt": "say a"}], name="train")


def test_prompts_keep_what_else_their_lines_hold(write_lines):
    rows = [{"prompt": "say a", "answer": "a", "n": 1}, {"messages": CHAT[:1], "answer": "b"}]
    for prompts in (read_prompts(write_lines("data.jsonl", rows)), read_prompts(rows)):
        assert [p.columns for p in prompts] == [{"answer": "a", "n": 1}, {"answer": "b"}]


def test_prompts_without_tokens_are_skipped_and_counted(tokenizer, capsys):
    rankings = [comparison("<eos>", "a", "b"), comparison("say", "a", "b")]
    first, second = encode_rankings(tokenizer, rankings, 8, "skip")
    assert not first.rows[0].prompt and second.rows[0].prompt
    assert capsys.readouterr().out.startswith("skipped 1 of 2 prompts; the first: prompt: expect")


def test_cut_responses_are_known(tokenizer):
    a, eos = tokenizer.convert_tokens_to_ids(["a", "<eos>"])
    examples = [Demonstration("say", text) for text in ("a", "a a", "a a a")]
    rows = encode_demonstrations(tokenizer, examples, 2)
    assert [row.response for row in rows] == [[a, eos], [a, a], [a, a]]
    assert [row.cut for row in rows] == [False, True, True]
    assert count_cut(rows) == 2


@pytest.mark.parametrize(
    ("texts", "ranks", "teaches"),
    [
        (("a", "b"), (1, 2), True),
        (("a", "b"), (1, 1), False),
        (("a a b", "a a c"), (1, 2), False),  # the cut to 2 tokens leaves the same
        (("a", "b", "a"), (1, 1, 2), True),  # the second against the third
    ],
)
def test_ranking_teaches_where_rank_and_tokens_differ(tokenizer, texts, ranks, teaches):
    (group,) = encode_rankings(tokenizer, [Ranking("say", texts, ranks)], 2)
    assert group.teaches is teaches


def test_whole_chats_hold_the_prompt():
    answers = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    for row in (answers, {"prompt": "lost"} | answers):
        with pytest.raises(
            DataError, match="expected chats that share what comes before an answer"
        ):
            read_rankings([row])


def test_unreadable_files(write_lines, tmp_path):
    whole = write_lines("data.jsonl.gz", [GOOD] * 50).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read after line"):
        read_demonstrations(cut)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file or directory$"):
        read_demonstrations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no examples"):
        read_demonstrations(write_lines("empty.jsonl", []))


def test_read_comparisons_and_rankings(write_lines):
    path = write_lines(
        "data.jsonl",
        [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2.5]},
        ],
    )
    assert read_rankings(path) == [
        Ranking("p", ("a", "b"), (0.0, 1.0)),
        Ranking("p", ("a", "b", "c"), (2.0, 1.0, 2.5)),
    ]


def test_ranks_that_a_float_would_round_stay_apart(write_lines):
    ranks = [2**60 + 1, 2**60, 2**60 + 2]
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": ranks}
    (ranking,) = read_rankings(write_lines("data.jsonl", [row]))
    assert ranking.ranks == tuple(ranks) and len(set(ranking.ranks)) == 3


def test_read_hh_transcripts(write_lines):
    opening = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    rows = [
        {"chosen": f"{opening} so long", "rejected": f"{opening} so what"},
        # Different answers to the first turn: the cut is before them, further turns follow.
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: ok\n\nAssistant: fine",
            "rejected": "\n\nHuman: hi\n\nAssistant: no",
        },
        # One answer continues the other.
        {"chosen": f"{opening} yes.", "rejected": f"{opening} yes"},
    ]
    first, second, third = read_rankings(write_lines("data.jsonl", rows))
    assert first == comparison(opening, " so long", " so what")
    assert second.prompt == "\n\nHuman: hi\n\nAssistant:"
    assert second.completions[1] == " no"
    assert third == comparison(opening, " yes.", " yes")


def test_read_chats_without_and_with_a_template(write_lines, tokenizer):
    path = write_lines("data.jsonl", [{"messages": CHAT}])
    plain = Demonstration("\n\nHuman: say a\n\nAssistant: a\n\nHuman: say b\n\nAssistant:", " b")
    assert read_demonstrations(path) == [plain]
    assert read_demonstrations(path, tokenizer) == [plain]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    (templated,) = read_demonstrations(path, tokenizer)
    prompt = "user say a <eos>\nassistant a <eos>\nuser say b <eos>\nassistant "
    assert templated == Demonstration(prompt, "b <eos>\n")
    # The template closes the turn: there is one eos, not two, and no newline behind it.
    assert encode_responses(tokenizer, [templated.response], 9) == [
        tokenizer.convert_tokens_to_ids(["b", "<eos>"])
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.text.first }}",
        "{{ 1 + messages[0].content }}",
    ],
)
def test_chat_that_its_template_refuses(write_lines, tokenizer, template):
    tokenizer.chat_template = template
    message = (
        r"chat\.jsonl:2: messages: the chat template refuses them: .*(roles|attribute|operand)"
    )
    with pytest.raises(DataError, match=message):
        read_demonstrations(write_lines("chat.jsonl", [GOOD, {"messages": CHAT}]), tokenizer)
    rows = [{"prompt": "say a"}, {"messages": CHAT[:1]}]
    with pytest.raises(DataError, match=message):
        read_prompts(write_lines("chat.jsonl", rows), tokenizer)


def test_prompts_without_tokens_name_file_and_line(write_lines, tokenizer):
    """Known only once there is a tokenizer, and after the split into training and held out."""
    message = r"\.jsonl:2: prompt: expected text with tokens, got '<eos>'$"
    rows: list = [{"prompt": "say a"}, {"prompt": "<eos>"}]
    prompts = read_prompts(write_lines("prompts.jsonl", rows))
    with pytest.raises(DataError, match=r"prompts" + message):
        encode_prompts(tokenizer, prompts)
    rows = [{**row, "response": "a", "chosen": "a", "rejected": "b"} for row in rows]
    path = write_lines("both.jsonl", rows)
    demonstrations = read_demonstrations(path)
    for part in split(demonstrations, [d.prompt for d in demonstrations], 0.5, seed=1):
        if part[0].prompt == "<eos>":
            with pytest.raises(DataError, match=r"both" + message):
                encode_demonstrations(tokenizer, part, 8)
    with pytest.raises(DataError, match=r"both" + message):  # once, not once a completion
        encode_rankings(tokenizer, read_rankings(path), 8)


def test_read_prompts(write_lines):
    path = write_lines("data.jsonl", [{"prompt": "say a"}, {"messages": CHAT[:1]}])
    assert read_prompts(path) == ["say a", "\n\nHuman: say a\n\nAssistant:"]
    with pytest.raises(DataError, match=r":1: messages: expected the last one before"):
        read_prompts(write_lines("bad.jsonl", [{"messages": CHAT}]))


def test_responses_end_with_one_eos_unless_cut(tokenizer):
    a, eos = tokenizer.convert_tokens_to_ids(["a", "<eos>"])
    texts = ["a", "a a", "a a a", ""]
    assert encode_responses(tokenizer, texts, 3) == [[a, eos], [a, a, eos], [a, a, a], [eos]]
    assert encode_responses(tokenizer, texts[:1], 3, eos=False) == [[a]]


def test_prompts_carry_one_bos_and_no_eos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    say, a, bos, eos = tokenizer.convert_tokens_to_ids(["say", "a", "good", "<eos>"])
    tokenizer.bos_token = "good"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="good $A <eos>", special_tokens=[("good", bos), ("<eos>", eos)]
    )
    # The second text was written by a chat template that opens with bos itself.
    encoded = encode_prompts(tokenizer, ["say a", "good say a"])
    assert encoded == [[bos, say, a], [bos, say, a]]
    with pytest.raises(DataError, match="expected text with tokens"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
        encode_prompts(tokenizer, [" "])


def test_rankings_are_encoded_best_first(tokenizer):
    (group,) = encode_rankings(tokenizer, [Ranking("say", ("a", "b", "c"), (2, 3, 1))], 8)
    assert group.ranks == [1, 2, 3]
    expected = encode_demonstrations(tokenizer, [Demonstration("say", x) for x in "cab"], 8)
    assert group.rows == expected


@pytest.mark.parametrize("pad", [0, 9])  # 9 is also the eos of the responses
def test_collate_labels_are_the_response_tokens(pad):
    rows = [Encoded([3, 4, 5], [6, 9]), Encoded([3], [7, 8, 9]), Encoded([3, 4], [9])]
    batch = collate(rows, pad)
    assert batch.input_ids.tolist() == [
        [3, 4, 5, 6, 9],
        [3, 7, 8, 9, pad],
        [3, 4, 9, pad, pad],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 4, 3]
    assert batch.columns.tolist() == [0, 1, 2, 3]
    assert batch.labels.tolist() == [
        [IGNORE, IGNORE, 6, 9],
        [7, 8, 9, IGNORE],
        [IGNORE, 9, IGNORE, IGNORE],
    ]


def test_collate_leaves_out_columns_that_no_row_needs():
    batch = collate([Encoded([3, 4, 5], [6]), Encoded([3, 4, 5, 6], [7])], 0)
    assert batch.columns.tolist() == [2, 3]
    assert batch.labels.tolist() == [[6, IGNORE], [IGNORE, 7]]


def test_left_padding_position_ids():
    ids, mask = left_pad([[5], [6, 7, 8]], 0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    right = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert positions(torch.cat([mask, right], 1)).tolist() == [
        [0, 0, 0, 1, 2, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_split_shares_no_prompt(pairs):
    train, held = split(pairs, [p.prompt for p in pairs], 0.3, seed=1)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held)
    assert len(train) + len(held) == len(pairs)
    assert len({p.prompt for p in held}) == 2  # of 6
    assert split(pairs, [p.prompt for p in pairs], 0.0, seed=1) == (pairs, [])


def test_order_is_a_function_of_seed_epoch_and_stream():
    assert shuffled(50, 1, 2, "x") == shuffled(50, 1, 2, "x")
    others = [shuffled(50, 2, 2, "x"), shuffled(50, 1, 3, "x"), shuffled(50, 1, 2, "y")]
    assert all(sorted(o) == list(range(50)) and o != shuffled(50, 1, 2, "x") for o in others)
