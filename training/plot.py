"""metrics.jsonl → loss.png: losses of training and of held-out pairs over the updates, and the learning rate below.

matplotlib is imported when the first picture is drawn, which a missing one, or anything that goes wrong with it, only
leaves out.
"""

import json
import logging
import os
import time
from pathlib import Path

import log

logger = logging.getLogger("minidalle")

POINTS = 5000  # lines that are read of a long file
COST = 0.01  # share of a run's time that its plots may take
# Name, colour, width and strength of the lines.
LOSSES = (("text", "#4f9a63", 1.2, 0.12), ("image", "#d9772b", 1.2, 0.12), ("total", "#1f4e8c", 2.0, 0.25))
GREY, LIGHT = "#555555", "#e3e3e3"
RANGE = 8  # of the largest to the smallest loss, from which on the axis is logarithmic


class Plot:
    """loss.png beside a metrics file, drawn anew where it is due."""

    def __init__(self, metrics_path):
        self.metrics_path = Path(metrics_path)
        self.path = self.metrics_path.with_name("loss.png")
        self.due_at, self.works = time.monotonic(), True

    def draw(self, at_end=False):
        """At checkpoints, but not so often that the run would become slower by it; and at the end."""
        started = time.monotonic()
        if not self.works or not self.metrics_path.exists() or (started < self.due_at and not at_end):
            return
        try:
            draw(self.metrics_path, self.path)
        except Exception as error:  # of a package that is not needed to train
            reason = "matplotlib is not installed" if isinstance(error, ImportError) else log.describe_error(error)
            logger.warning("no %s: %s", self.path, reason)
            self.works = isinstance(error, OSError)  # a disk may have room again
        now = time.monotonic()
        self.due_at = now + (now - started) / COST


def read(path, points=POINTS):
    """name → (steps, values) of at most some `points` lines of updates, evenly spaced, and of all validations and
    updates that were left out.

    What is not finite is NaN; a line cut short is left out.
    """
    with open(path, "rb") as file:
        count = sum(1 for _ in file)
    stride, curves = 1 + count // points, {}
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            wanted = number % stride == 0 or number == count - 1 or b'"held-out/' in line or b'"skipped"' in line
            if not wanted:
                continue
            try:
                figures = json.loads(line)
                step = figures.pop("step")
            except (ValueError, KeyError, AttributeError):
                continue
            for name, value in figures.items():
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float("nan") if value is None else value)
    return curves


def smoothed(values):
    """Means over a window of a fifteenth of the curve, by a bell rather than a box; NaN is passed over."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    reach = len(values) // 30
    weights = np.hanning(2 * reach + 3)[1:-1]
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0), weights)[reach:][: len(values)]
    shares = np.convolve(known.astype(float), weights)[reach:][: len(values)]
    return np.where(shares > 0, sums / np.maximum(shares, 1e-12), np.nan)


def draw(metrics_path, path):
    """The picture, written beside its name and renamed. ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read(metrics_path)
    figure = Figure(figsize=(10, 6.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (5, 1), "hspace": 0.1})
    figure.subplots_adjust(left=0.08, right=0.84, top=0.92, bottom=0.09)
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, rates):
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aaaaaa")
        axes.tick_params(which="both", color="#aaaaaa", labelcolor=GREY, labelsize=9)
        axes.grid(color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
    draw_losses(losses, curves)
    steps, values = curves.get("lr", ((), ()))
    rates.plot(steps, values, color=GREY, linewidth=1.2)
    rates.fill_between(steps, values, color=LIGHT)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rates.yaxis.get_offset_text().set(size=8, color=GREY)
    rates.set_ylabel("learning rate", color=GREY, fontsize=9)
    rates.set_xlabel("updates", color=GREY, fontsize=9)
    rates.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    beside = path.with_name(f"{path.name}.tmp")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    finally:
        if beside.exists():
            beside.unlink()


def draw_losses(axes, curves):
    """Training: every update lightly, and smoothed; held-out: dots. What a curve is stands at its end."""
    import numpy as np

    ends, shown = [], []
    for name, colour, width, strength in LOSSES:
        steps, raw = curves.get(f"loss/{name}", ((), ()))
        line = smoothed(raw) if len(raw) else np.zeros(0)
        axes.plot(steps, raw, color=colour, linewidth=0.7, alpha=strength)
        axes.plot(steps, line, color=colour, linewidth=width)
        held_steps, held = curves.get(f"held-out/{name}", ((), ()))
        dots = {"marker": "o", "markersize": 4 if len(held) < 60 else 0, "markerfacecolor": "white"}
        axes.plot(held_steps, held, color=colour, linewidth=width * 0.7, linestyle=(0, (4, 2)), **dots)
        known = np.concatenate([line, np.asarray(held, dtype=float)])
        shown += known[np.isfinite(known)].tolist()
        for place, curve in (("training", line), ("held-out", np.asarray(held, dtype=float))):
            curve = curve[np.isfinite(curve)]
            if len(curve):
                ends.append((curve[-1], f"{name}{', held-out' * (place == 'held-out')} {curve[-1]:.3g}", colour))
    skipped, _ = curves.get("skipped", ((), ()))
    axes.plot(skipped, [0.01] * len(skipped), "|", color="#b00020", transform=axes.get_xaxis_transform())
    if not shown:
        return
    low, high = min(shown), max(shown)
    if low > 0 and high > RANGE * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
        axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axes.yaxis.set_minor_formatter(lambda loss, _: f"{loss:g}" if f"{loss:.0e}"[0] in "25" else "")
    else:
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    last = max(max(curves.get(f"loss/{name}", ([0], ()))[0], default=0) for name, *_ in LOSSES)
    label_ends(axes, ends)
    left_out = f", {len(skipped)} left out (red ticks)" if len(skipped) else ""
    axes.set_title(f"Loss after {last:,} updates{left_out}", loc="left", fontsize=12, color="#222222")
    axes.set_title("line: training, smoothed    dashes: held-out", loc="right", fontsize=9, color=GREY)


def label_ends(axes, ends, gap=0.045):
    """(value, text, colour) right of the axes at their heights, moved apart where they would touch."""
    to_height = axes.transData + axes.transAxes.inverted()
    heights = [(to_height.transform((0, value))[1], text, colour) for value, text, colour in sorted(ends)]
    place = -1.0
    placed = []
    for height, text, colour in heights:
        place = max(height, place + gap)
        placed.append([place, text, colour])
    ceiling = 1.0 + gap
    for label in reversed(placed):  # what was moved above the top comes down again
        ceiling = label[0] = min(label[0], ceiling - gap)
    for height, text, colour in placed:
        axes.text(1.01, height, text, transform=axes.transAxes, color=colour, fontsize=9, va="center")
