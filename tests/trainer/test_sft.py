"""Stage 1: supervised fine-tuning."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import main
from rlhf_trainer.config import ConfigError, DataError
from rlhf_trainer.data import Demonstration
from rlhf_trainer.model import check_head, scratch_model
from rlhf_trainer.sampling import respond
from rlhf_trainer.sft import train_sft


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_sft_learns_to_answer_and_to_stop(
    sft_config, make_model, tokenizer, demonstrations, same_weights, kind
):
    result = train_sft(
        sft_config(epochs=20, patience=0),
        model=make_model(kind),
        tokenizer=tokenizer,
        train=demonstrations,
        heldout=demonstrations[:6],
    )
    assert result.best["loss"] < 0.1 * result.history[0]["loss"]
    answers = respond(
        result.model,
        tokenizer,
        [d.prompt for d in demonstrations],
        max_response_tokens=4,
        temperature=0,
    )
    assert [a.text for a in answers] == [d.response for d in demonstrations]
    assert all(a.ended for a in answers)
    saved = AutoModelForCausalLM.from_pretrained(result.folder)
    assert same_weights(saved, result.model)
    assert AutoTokenizer.from_pretrained(result.folder).get_vocab() == tokenizer.get_vocab()


def test_eos_is_learned_where_it_is_also_the_pad_token(
    sft_config, make_model, make_tokenizer, demonstrations
):
    tokenizer = make_tokenizer("<eos>")
    result = train_sft(
        sft_config(epochs=20), model=make_model(), tokenizer=tokenizer, train=demonstrations,
        heldout=[],
    )  # fmt: skip
    answers = respond(
        result.model, tokenizer, ["say a", "say b twice a"], max_response_tokens=4, temperature=0
    )
    assert [(a.text, a.ended) for a in answers] == [("a", True), ("a a", True)]


def test_loss_is_the_mean_over_the_response_tokens_of_the_batch(
    sft_config, make_model, tokenizer, demonstrations
):
    """Independent of our collator and kernels: torch's cross entropy, one sequence at a time."""
    config = sft_config(batch_size=len(demonstrations), epochs=1, micro_batch_size=5)
    model, total, tokens = make_model().eval(), 0.0, 0
    for example in demonstrations:
        prompt = tokenizer(example.prompt).input_ids
        response = [*tokenizer(example.response).input_ids, 1]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(response), reduction="sum"
        ).item()
        tokens += len(response)
    result = train_sft(
        config, model=make_model(), tokenizer=tokenizer, train=demonstrations, heldout=[]
    )
    assert result.history[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result.history[0]["tokens"] == tokens


def test_gradient_accumulation_changes_nothing_but_rounding(
    sft_config, make_model, tokenizer, demonstrations, untimed
):
    """Responses of different lengths: a mean of micro-batch means would be off by far more."""
    histories = []
    for size in (1, 4, 6):
        result = train_sft(
            sft_config(f"micro-{size}", micro_batch_size=size, epochs=2, learning_rate=1e-3),
            model=make_model(),
            tokenizer=tokenizer,
            train=demonstrations,
            heldout=[],
        )
        histories.append([row["loss"] for row in result.history])
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    assert histories[2] == pytest.approx(histories[0], rel=1e-4)


def test_every_epoch_takes_all_examples_in_its_own_order(
    sft_config, make_model, tokenizer, demonstrations
):
    result = train_sft(
        sft_config(batch_size=5, epochs=3), model=make_model(), tokenizer=tokenizer,
        train=demonstrations, heldout=[],
    )  # fmt: skip
    tokens = [row["tokens"] for row in result.history]
    epochs = [tokens[:4], tokens[4:8], tokens[8:]]
    assert {sum(epoch) for epoch in epochs} == {6 * 2 + 12 * 3}
    assert epochs[0] != epochs[1] != epochs[2]


def test_reference_backend_gives_the_same_curve(
    sft_config, make_model, tokenizer, demonstrations, untimed
):
    auto, reference = (
        train_sft(
            sft_config(backend, backend=backend, learning_rate=1e-3, epochs=4),
            model=make_model(),
            tokenizer=tokenizer,
            train=demonstrations,
            heldout=demonstrations[:4],
        ).history
        for backend in ("auto", "reference")
    )
    assert len(auto) == len(reference)
    for one, two in zip(untimed(auto), untimed(reference), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_best_weights_are_kept_and_patience_ends_the_run(
    sft_config, make_model, tokenizer, demonstrations
):
    """Held-out answers that contradict the training data: their loss soon rises."""
    heldout = [Demonstration("say a", "b"), Demonstration("say b", "a")]
    config = sft_config(epochs=40, eval_every=1, patience=4, learning_rate=3e-3)
    result = train_sft(
        config, model=make_model(), tokenizer=tokenizer, train=demonstrations, heldout=heldout
    )
    losses = [row["heldout_loss"] for row in result.history]
    assert result.best == {"loss": min(losses), "step": losses.index(min(losses)) + 1}
    assert len(losses) == result.best["step"] + 4 < 120
    again = train_sft(
        sft_config("again", epochs=1, batch_size=18, learning_rate=1e-30),
        model=result.model,
        tokenizer=tokenizer,
        train=demonstrations,
        heldout=heldout,
    )
    assert again.best["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_early_stop_says_so(sft_config, make_model, tokenizer, demonstrations, capsys):
    heldout = [Demonstration("say a", "b"), Demonstration("say b", "a")]
    config = sft_config(epochs=40, eval_every=1, patience=4, learning_rate=3e-3)
    data = {"tokenizer": tokenizer, "train": demonstrations, "heldout": heldout}
    result = train_sft(config, model=make_model(), **data)
    best = result.best["step"]
    assert (
        f"sft: stopped early, after step {best + 4} of 120: the last 4 held-out evaluations found "
        f"no loss below that of step {best}\n"
    ) in capsys.readouterr().out
    train_sft(sft_config("whole", epochs=1), model=make_model(), **data)
    assert "stopped early" not in capsys.readouterr().out


def test_sft_from_dicts_skipping_the_bad_ones(
    sft_config, make_model, tokenizer, demonstrations, same_weights, capsys
):
    """The same training as from Demonstrations; a prompt without tokens is found late."""
    dicts: list[dict] = [{"prompt": d.prompt, "response": d.response} for d in demonstrations]
    bad = [{"prompt": "say a", "response": " "}, {"prompt": "<eos>", "response": "a"}]
    data = {"tokenizer": tokenizer, "heldout": dicts[:4]}
    good = train_sft(
        sft_config("good"), model=make_model(), train=demonstrations, tokenizer=tokenizer,
        heldout=demonstrations[:4],
    )  # fmt: skip
    again = train_sft(sft_config("dicts"), model=make_model(), train=dicts, **data)
    assert same_weights(again.model, good.model)
    for name, error in (("blank", bad[:1]), ("empty", bad[1:])):
        with pytest.raises(
            DataError, match=r"^train\[18\]: (response: expected an answer|prompt:)"
        ):
            train_sft(sft_config(name), model=make_model(), train=[*dicts, *error], **data)
    capsys.readouterr()
    skipped = train_sft(
        sft_config("skip", on_bad_line="skip"), model=make_model(), train=[*dicts, *bad], **data
    )
    assert same_weights(skipped.model, good.model)
    said = capsys.readouterr().out
    assert "skipped 1 of 20 examples of train; the first: train[18]: response: expected" in said
    assert "skipped 1 of 19 prompts; the first: train[19]: prompt: expected text with t" in said
    assert "18 demonstrations, 4 held out, 1 dropped" in said


def test_keep_last(sft_config, make_model, tokenizer, demonstrations, same_weights):
    """What is kept differs from the best where the held-out loss rises."""
    heldout = [Demonstration("say a", "b"), Demonstration("say b", "a")]
    best, last = (
        train_sft(
            sft_config(keep, keep=keep, epochs=12, patience=0),
            model=make_model(),
            tokenizer=tokenizer,
            train=demonstrations,
            heldout=heldout,
        )
        for keep in ("best", "last")
    )
    assert best.history[-1]["heldout_loss"] > best.best["loss"]
    assert not same_weights(best.model, last.model)
    assert same_weights(AutoModelForCausalLM.from_pretrained(last.folder), last.model)


def test_resumed_run_equals_the_uninterrupted_one(
    sft_config, make_model, tokenizer, demonstrations, interrupt, same_weights, untimed
):
    """Bit for bit, with dropout on: weights, optimiser, schedule, random state, data order, and the
    best held-out loss, which here comes before the interruption."""
    heldout = [Demonstration("good", "say")]  # which no response says: ever less likely
    data = {"tokenizer": tokenizer, "train": demonstrations, "heldout": heldout}
    options = {"dropout": 0.2, "epochs": 4, "save_every": 4, "patience": 0, "micro_batch_size": 4}
    options |= {"eval_every": 1}
    whole = train_sft(sft_config("whole", **options), model=make_model(), **data)
    assert 1 <= whole.best["step"] <= 4
    config = sft_config("broken", **options)
    with pytest.raises(interrupt.error):
        train_sft(config, model=make_model(), on_step=interrupt(7), **data)
    config.resume = True
    seen: list[dict] = []
    resumed = train_sft(config, model=make_model(), on_step=seen.append, **data)
    assert seen[0]["step"] == 5
    assert same_weights(resumed.model, whole.model)
    assert untimed(resumed.history) == untimed(whole.history)
    kept = sorted(path.name for path in config.output.glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-8"]
    assert not list(config.output.glob("best-*"))
    assert resumed.best == whole.best


def test_resume_names_what_changed(sft_config, make_model, tokenizer, demonstrations, interrupt):
    data = {"tokenizer": tokenizer, "train": demonstrations, "heldout": []}
    config = sft_config(save_every=1)
    with pytest.raises(interrupt.error):
        train_sft(config, model=make_model(), on_step=interrupt(2), **data)
    changed = sft_config(resume=True, learning_rate=5e-3)
    with pytest.raises(
        ConfigError, match=r"learning_rate: expected 0.01 as in .*checkpoint-1, got"
    ):
        train_sft(changed, model=make_model(), **data)
    data["train"] = demonstrations[1:]
    with pytest.raises(ConfigError, match="training data: expected those of"):
        train_sft(sft_config(resume=True), model=make_model(), **data)


def test_checkpoints_are_loadable_models(
    sft_config, make_model, tokenizer, demonstrations, interrupt, same_weights
):
    config, model = sft_config(save_every=2), make_model()
    with pytest.raises(interrupt.error):
        train_sft(
            config, model=model, tokenizer=tokenizer, train=demonstrations, on_step=interrupt(2)
        )
    result = train_sft(
        sft_config("next", epochs=1), model=model, tokenizer=tokenizer, train=demonstrations
    )
    folder = result.folder.parent
    assert not list(folder.glob("checkpoint-*"))  # save_every=0
    train_sft(
        sft_config(resume=True, save_every=2), model=model, tokenizer=tokenizer,
        train=demonstrations,
    )  # fmt: skip
    checkpoint = config.output / "checkpoint-18"
    assert list((checkpoint / "model").glob("*.safetensors"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(checkpoint / "model"), type(model))


def test_unsavable_generation_config(sft_config, make_model, tokenizer, demonstrations):
    """Found before training, not at its end (transformers 29988)."""
    model, config = make_model(), sft_config()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    with pytest.raises(ConfigError, match=r"model: expected settings .*temperature"):
        train_sft(config, model=model, tokenizer=tokenizer, train=demonstrations)
    assert not (config.output / "metrics.jsonl").exists()
    assert not (config.output / "model").exists()


def test_tokens_without_an_embedding_are_refused(sft_config, make_model, tokenizer, demonstrations):
    """In memory too, where no folder names the sizes."""
    with pytest.raises(ConfigError, match="at most the 9 tokens of model, got 13"):
        train_sft(
            sft_config(), model=make_model(vocab_size=9), tokenizer=tokenizer, train=demonstrations
        )


def test_long_prompts_are_dropped_and_long_responses_cut(sft_config, make_model, tokenizer, capsys):
    train = [
        Demonstration("say a", "a"),
        Demonstration("say a b c", "a"),
        Demonstration("say b", "b b b b"),
    ]
    config = sft_config(
        batch_size=3, epochs=1, max_prompt_tokens=3, max_response_tokens=3, heldout_share=0.0
    )
    result = train_sft(config, model=make_model(), tokenizer=tokenizer, train=train)
    said = "2 demonstrations, 0 held out, 1 dropped (long prompts); 1 responses cut to 3 tokens\n"
    assert said in capsys.readouterr().out
    assert result.history[0]["tokens"] == 2 + 3  # "a <eos>" and "b b b"
    with pytest.raises(ConfigError, match="expected a prompt that fits, got 3 longer ones"):
        train_sft(
            sft_config("none", max_prompt_tokens=1), model=make_model(), tokenizer=tokenizer,
            train=train, heldout=[],
        )  # fmt: skip


def test_sft_from_files_by_the_command_line(tmp_path, write_lines, demonstrations):
    """A scratch model with a tokenizer trained on the data; every file that a run leaves."""
    rows = [{"prompt": d.prompt, "response": d.response} for d in demonstrations]
    path, output = write_lines("train.jsonl.gz", rows), tmp_path / "run"
    args = f"sft --model scratch:llama-tiny --train-file {path} --output {output} --device cpu"
    main([*args.split(), "--epochs", "2", "--batch-size", "8", "--no-progress"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    assert {"loss", "lr", "heldout_loss"} <= lines[-1].keys()
    assert (output / "curves.png").stat().st_size > 1000
    kernels = json.loads((output / "kernels.json").read_text())
    assert kernels["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(output / "model"))
    assert list((output / "model").glob("*.safetensors"))


def test_another_precision_needs_another_process(sft_config, make_model, tokenizer, demonstrations):
    data = {"tokenizer": tokenizer, "train": demonstrations, "heldout": []}
    train_sft(sft_config("fp32", epochs=1), model=make_model(), **data)
    with pytest.raises(ConfigError, match=r"^precision, device: .*got bf16 and cpu: .*new process"):
        train_sft(sft_config("bf16", epochs=1, precision="bf16"), model=make_model(), **data)


def test_the_check_of_the_head_passes_a_mask(tokenizer):
    """Without one transformers told every user of a scratch model that its ids may be padded."""
    model = scratch_model("gpt2-tiny", tokenizer)
    masks = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: masks.append(options["attention_mask"]), with_kwargs=True
    )
    check_head(model)
    assert [mask.tolist() for mask in masks] == [[[1]]]


def test_bf16(sft_config, make_model, tokenizer, demonstrations):
    """Mixed precision: the weights stay float32 and the loss stays close."""
    from accelerate.state import AcceleratorState

    data = {"tokenizer": tokenizer, "train": demonstrations, "heldout": []}
    exact = train_sft(sft_config("fp32", epochs=1), model=make_model(), **data)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    try:
        mixed = train_sft(
            sft_config("bf16", epochs=1, precision="bf16"), model=make_model(), **data
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert next(mixed.model.parameters()).dtype == torch.float32
    losses = [[row["loss"] for row in result.history] for result in (mixed, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]
