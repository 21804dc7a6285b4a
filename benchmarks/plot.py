"""A bar chart of the results: speed and memory of each row."""

from typing import Any, Dict, Sequence, Tuple

from matplotlib.figure import Figure

from utils.files import AnyPath, atomic_write

OURS, PEER = "#4477aa", "#ee9944"


def format_number(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bar_lengths(row: Dict[str, Any]) -> Tuple[float, float]:
    """Return our speed and the peer's in percent of the limit; if no limit is known, the faster bar is 80 long."""
    ratio = row["ratio"] or float("inf")
    ours = 100 * row["of_limit"] if row["limit"] else 80 * min(1, ratio)
    return ours, ours / ratio


def plot_speed(rows: Sequence[Dict[str, Any]], title: str, path: AnyPath) -> None:
    """Save rows of results.json as bars: speed as a share of the machine's limit, and peak memory."""
    figure = Figure(figsize=(11, 0.6 * len(rows) + 1.6), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 1]})
    for index, (side, color) in enumerate((("ours", OURS), ("peer", PEER))):
        places = [place for place, row in enumerate(rows) if row[side]]
        measured = [rows[place] for place in places]
        if not measured:
            continue
        offsets = [place + 0.4 * (index - 0.5) * bool(rows[place]["peer"]) for place in places]
        style: Dict[str, Any] = {"height": 0.38, "color": color}
        label = "here" if side == "ours" else "peer: " + ", ".join(sorted({row["peer_name"] for row in measured}))
        bars = speed.barh(offsets, [bar_lengths(row)[index] for row in measured], label=label, **style)
        speed.bar_label(bars, [_label(row, side) for row in measured], padding=3, fontsize=8)
        bars = memory.barh(offsets, [row[side]["peak_memory_mb"] for row in measured], **style)
        memory.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    names = [f"{row['what']}\n" + (f"limit: {row['limit_is']}" if row["limit"] else "no limit known") for row in rows]
    speed.set_yticks(range(len(rows)), names, fontsize=8)
    speed.axvline(100, color="gray", linewidth=1, linestyle="--", zorder=0)
    speed.set(xlim=(0, 145), xlabel="speed, % of the limit (medians)", xticks=range(0, 101, 20))
    memory.set(xlabel="peak memory, MB")
    memory.margins(x=0.25)
    speed.invert_yaxis()
    speed.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _label(row: Dict[str, Any], side: str) -> str:
    text = f"{format_number(row[side]['median'])} {row['unit']}"
    return f"{text}, {format_number(row['ratio'])}× the peer" if side == "ours" and row["ratio"] else text
