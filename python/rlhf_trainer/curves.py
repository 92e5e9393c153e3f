"""Pictures of a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

History = Sequence[Mapping[str, Any]]
COLUMNS = 3
FEW = 30  # points that are marked one by one


class Panel(NamedTuple):
    """Some numbers of the metrics that share an axis: its label, and the numbers' own by key."""

    label: str
    series: dict[str, str]
    share: bool = False  # the numbers lie between 0 and 1


LOSS = {"loss": "training", "heldout_loss": "held-out"}
PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (Panel("loss (nats a token)", LOSS),),
    "reward": (
        Panel("loss (nats a pair)", LOSS),
        Panel(
            "share of pairs in the right order",
            {"accuracy": "training", "heldout_accuracy": "held-out"},
            share=True,
        ),
        Panel("score, better less worse", {"margin": "training"}),
    ),
    "ppo": (
        Panel("mean score", {"score": "score", "reward": "score less KL penalty"}),
        Panel("reference KL (nats a response)", {"kl": "exact", "kl_sampled": "sampled"}),
        Panel("entropy (nats a token)", {"entropy": "entropy"}),
        Panel("mean length (tokens)", {"length": "length"}),
        Panel("share of responses that ended", {"eos_rate": "ended"}, share=True),
        Panel("share clipped", {"clip_frac": "policy", "value_clip_frac": "value"}, share=True),
        Panel(
            "KL of an update (nats a token)",
            {"approx_kl": "all steps", "first_approx_kl": "first step"},
        ),
        Panel("largest probability ratio", {"ratio_max": "ratio"}),
        Panel("policy loss", {"policy_loss": "loss"}),
        Panel("value loss", {"value_loss": "loss"}),
        Panel("mean value", {"value": "value"}),
        Panel("values' explained variance", {"explained_variance": "variance"}),
        Panel("KL coefficient", {"kl_coef": "coefficient"}),
    ),
}
LAST = (
    Panel("learning rate", {"lr": "rate"}),
    Panel("response tokens a step", {"tokens": "tokens"}),
    Panel("seconds a step", {"seconds": "seconds"}),
    Panel("gradient norm", {"grad_norm": "norm"}),
    Panel("steps skipped so far", {"skipped": "steps"}),
)
# The horizontal axis itself in other units, and what another number says already.
LEFT_OUT = {"stage", "step", "epoch", "episodes", "cut"}


def plot(history: History, path: Path) -> None:
    """Write the picture of a run's metrics; none where they hold no number."""
    figure = picture(history)
    if figure is not None:
        figure.savefig(path, dpi=100)


def picture(history: History) -> Figure | None:
    """A panel for each kind of number in the metrics, training and held-out ones together."""
    stage = history[0]["stage"] if history else ""
    known = (*PANELS.get(stage, ()), *LAST)
    listed = LEFT_OUT.union(*(panel.series for panel in known))
    rest = dict.fromkeys(key for row in history for key in row if key not in listed)
    panels = [*known, *(Panel(key.replace("_", " "), {key: key}) for key in rest)]
    panels = [panel for panel in panels if any(points(history, key) for key in panel.series)]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    plural = "" if len(history) == 1 else "s"
    figure.suptitle(f"{stage}: {len(history)} {step_name(stage)}{plural}", fontsize=11)
    for k, panel in enumerate(panels):
        draw(figure.add_subplot(rows, columns, k + 1), panel, history)
    return figure


def draw(axes: Axes, panel: Panel, history: History) -> None:
    """One panel: its curves, both axes' labels, and a legend where there are several curves."""
    drawn = {key: found for key in panel.series if (found := points(history, key))}
    for key, found in drawn.items():
        steps = [step for step, _ in found]
        marker = "." if len(found) < FEW else ""
        heldout = key.startswith("heldout_")
        axes.plot(
            steps, [value for _, value in found], marker=marker, linewidth=1.6 if heldout else 1.1,
            label=panel.series[key], zorder=3 if heldout else 2,
        )  # fmt: skip
    axes.set_xlabel(step_name(history[0]["stage"]), fontsize=9)
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    values = [value for found in drawn.values() for _, value in found]
    axes.set_ylim(*limits(values, panel.share))
    last = max(step for found in drawn.values() for step, _ in found)
    first = min(step for found in drawn.values() for step, _ in found)
    margin = max(0.03 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    if len(drawn) > 1:
        axes.legend(fontsize=8, loc="best")


def limits(values: Sequence[float], share: bool) -> tuple[float, float]:
    """Of the vertical axis: all values with a margin; of a share, and of zeros alone, 0 to 1;
    around a constant a tenth of it."""
    low, high = min(values), max(values)
    if share or low == high == 0:
        return min(low, 0.0) - 0.04, max(high, 1.0) + 0.04
    margin = 0.06 * (high - low) if high > low else 0.1 * abs(high)
    return low - margin, high + margin


def points(history: History, key: str) -> list[tuple[int, float]]:
    """(step, value) where the metrics hold a number of that name."""
    return [(row["step"], row[key]) for row in history if row.get(key) is not None]


def step_name(stage: str) -> str:
    return "iteration" if stage == "ppo" else "optimiser step"
