"""Pictures of a run: what is in them, and that nothing of it is cut off."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_trainer import demo
from rlhf_trainer.curves import LEFT_OUT, picture, plot


def sft(steps: int, every: int = 0) -> list[dict[str, Any]]:
    rows = [
        {
            "stage": "sft", "step": k, "epoch": k / 10, "loss": 1 + 5 * math.exp(-k / steps),
            "lr": 1e-5, "tokens": 900 + k % 7, "seconds": 0.5,
        }
        for k in range(1, steps + 1)
    ]  # fmt: skip
    for row in rows if every else []:
        if row["step"] % every == 0:
            row["heldout_loss"] = row["loss"] + 0.3
    return rows


def reward(steps: int) -> list[dict[str, Any]]:
    rows = [
        {"stage": "reward", "step": k, "loss": 0.7 - 0.1 * k, "accuracy": 0.5, "margin": -0.1}
        for k in range(1, steps + 1)
    ]
    rows[-1] |= {"heldout_loss": 0.6, "heldout_accuracy": 1.0}
    return rows


def ppo(steps: int) -> list[dict[str, Any]]:
    keys = (
        "score reward kl kl_sampled entropy length eos_rate cut episodes kl_coef clip_frac "
        "approx_kl ratio_max first_approx_kl policy_loss value_loss value_clip_frac "
        "explained_variance lr seconds"
    )
    return [
        {"stage": "ppo", "step": k, **{key: 0.1 * k for key in keys.split()}, "value_loss": None}
        for k in range(1, steps + 1)
    ]


RUNS = {
    "one step": sft(1),
    "nothing held out": sft(30),
    "held out": sft(40, 10),
    "long": sft(5000, 400),
    "constant": [row | {"loss": 2.0} for row in sft(9)],
    "tiny numbers": [row | {"loss": 1e-9 * row["step"]} for row in sft(9)],
    "spike": [row | {"loss": 1e7 if row["step"] == 5 else 1.0} for row in sft(9)],
    "unknown number": [row | {"skipped_steps": 0} for row in sft(9)],
    "reward": reward(5),
    "reward, one step": reward(1),
    "ppo": ppo(12),
    "ppo, one iteration": ppo(1),
    "demo": None,
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_cut_off_or_lies_on_another(name):
    """Each text and curve is within the figure, each curve within its axes, no two panels meet."""
    history = RUNS[name]
    figure = demo.picture(sft(40, 10), reward(5), ppo(12)) if history is None else picture(history)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    whole = figure.bbox
    boxes = []
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()
        assert (axes.get_legend() is not None) == (len(axes.lines) > 1)
        box = axes.get_tightbbox(renderer)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1, axes.get_ylabel()
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1, axes.get_ylabel()
        label = axes.yaxis.label.get_window_extent(renderer)
        assert label.height <= 1.15 * axes.bbox.height, axes.get_ylabel()
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            assert all(left < x < right for x in line.get_xdata())
            assert all(low < y < high for y in line.get_ydata())
        ticks = [t for t in axes.get_xticks() if left <= t <= right]
        assert ticks and all(t == round(t) for t in ticks)
        boxes.append(box)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def curves(history) -> dict[str, list[str]]:
    figure = picture(history)
    return {axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in figure.axes}


def test_training_and_held_out_numbers_share_a_panel():
    drawn = curves(RUNS["held out"])
    assert drawn["loss (nats a token)"] == ["training", "held-out"]
    assert curves(RUNS["nothing held out"])["loss (nats a token)"] == ["training"]
    drawn = curves(RUNS["reward"])
    assert drawn["loss (nats a pair)"] == ["training", "held-out"]
    assert drawn["share of pairs in the right order"] == ["training", "held-out"]
    (axes, *_) = picture(RUNS["held out"]).axes
    assert axes.get_xlabel() == "optimiser step"
    assert list(axes.lines[1].get_xdata()) == [10, 20, 30, 40]
    assert list(axes.lines[0].get_ydata()) == [row["loss"] for row in RUNS["held out"]]


def test_every_number_is_drawn_once():
    for name in ("held out", "reward", "ppo", "unknown number"):
        numbers = {k for row in RUNS[name] for k, v in row.items() if v is not None} - LEFT_OUT
        assert sum(map(len, curves(RUNS[name]).values())) == len(numbers)
    assert "skipped steps" in curves(RUNS["unknown number"])
    assert picture(RUNS["ppo"]).axes[0].get_xlabel() == "iteration"


def test_shares_reach_from_zero_to_one():
    shares = [a for a in picture(RUNS["ppo"]).axes if a.get_ylabel().startswith("share")]
    assert len(shares) == 2
    for axes in shares:
        low, high = axes.get_ylim()
        assert low < 0 and high > 1


def test_a_count_that_stays_0_has_no_axis_below_it():
    drawn = picture([row | {"skipped": 0} for row in sft(9)]).axes
    (axes,) = (a for a in drawn if a.get_ylabel() == "steps skipped so far")
    assert axes.get_ylim() == pytest.approx((-0.04, 1.04))


def test_plot_writes_a_png_or_nothing(tmp_path):
    plot(RUNS["held out"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for history in ([], [{"stage": "sft", "step": 1, "loss": None}]):
        plot(history, tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()
