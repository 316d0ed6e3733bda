"""Figures from numbers and labels, never from a model: they return a Figure and show nothing.

The palette is Okabe and Ito's, told apart by colour-blind readers too; nothing is drawn that does
not carry information.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Read before: utils.py; after: metrics.py
Source: Tufte 1983 (data-ink); Okabe & Ito 2008 (colours)
"""

import itertools
import textwrap

import numpy as np
from matplotlib.figure import Figure

from utils import atomic_write

FEW = 30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save(figure, path):
    """Writes a figure as PNG; the same figure gives the same bytes."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def bare_axes(axes, title, xlabel, ylabel):
    """The axes with a title and labels, without the upper and right frame."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_lines(axes, lines, levels):
    """Draws {name: (x, y)}, a few values as points: what lies between was not measured; and
    {name: y} as horizontal lines of reference."""
    for (name, (x, y)), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        few = {"marker": "o", "markersize": 4, "linestyle": ":", "linewidth": 0.8}
        style = few if len(x) <= FEW else {"linewidth": 1.2}
        axes.plot(x, y, color=colour, label=name, **style)
    for name, level in levels.items():
        axes.axhline(level, color="0.55", linewidth=1, linestyle="--")
        axes.annotate(name, (0.99, level), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", color="0.35", fontsize=9)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)


def curve(lines, *, title, xlabel, ylabel, levels=None):
    """Lines over a common x axis, named in a legend where there are several.

    lines: {name: (x, y)}, sequences of equal length. levels: {name: y}, horizontal lines of
    reference. Returns a Figure.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw_lines(bare_axes(figure.subplots(), title, xlabel, ylabel), lines, levels or {})
    return figure


def training_curves(rows, *, name, unit, levels):
    """The Figure of a run: the losses; where it is known, how far each kind of word lies above its
    floor; and below, smaller, the learning rate and the gradient's norm.

    rows: a run's lines, dicts with some of train_loss, val_loss, above_floor ({category: nats}), lr
    and grad_norm. name: of the text. unit: what a token is. levels: {name: nats} to compare with.
    """
    def over_steps(key):
        having = [row for row in rows if key in row]
        return [row["step"] for row in having], [row[key] for row in having]

    parts = [({"training": over_steps("train_loss"), "validation": over_steps("val_loss")},
              f"loss (nats/{unit})", levels)]
    steps, above = over_steps("above_floor")
    if above:
        lines = {kind: (steps[1:], [nats[kind] for nats in above[1:]])  # not what chance gives
                 for kind in above[0] if kind != "all"}
        parts.append((lines, f"above the floor (nats/{unit})", {"the floor": 0.0}))
    small = [({"": over_steps("lr")}, "learning rate", {}),
             ({"": over_steps("grad_norm")}, "gradient norm", {})]
    heights = [3] * len(parts) + [1] * len(small)
    figure = Figure(figsize=(7, 1.3 * sum(heights)), layout="constrained")
    rows_of_axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    for axes, (lines, ylabel, marks) in zip(rows_of_axes, parts + small, strict=True):
        draw_lines(bare_axes(axes, "", "", ylabel), lines, marks)
    figure.axes[-1].set_xlabel("step")
    figure.axes[0].set_title(f"{name}: {rows[-1]['val_loss']:.3f} nats/{unit} on unseen text",
                             loc="left", fontsize=11)
    return figure


def dot_rows(rows, *, title, xlabel):
    """A row for each number, with its interval and what it is held against.

    rows: {name: (value, low, high, mark)}. Returns a Figure.
    """
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = bare_axes(figure.subplots(), title, xlabel, "")
    for y, (value, low, high, mark) in enumerate(rows.values()):
        axes.plot([low, high], [y, y], color=COLOURS[0], linewidth=2.5, alpha=0.5)
        axes.plot(value, y, "o", color=COLOURS[0])
        axes.plot(mark, y, "x", color=COLOURS[1])
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 52) for name in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    return figure


def heatmap(values, *, title, xlabel, ylabel, row_labels=None, column_labels=None):
    """A matrix as colours. values: [rows, columns], not negative or of both signs.

    Values of both signs get a scale that is symmetric about a white zero; masked cells
    and those that are not finite stay blank. Returns a Figure.
    """
    values = np.ma.masked_invalid(np.ma.asarray(values, dtype=float))
    most = np.abs(values).max() if values.count() else 1.0
    signed = values.count() and values.min() < 0
    side = 1.6 + 0.19 * max(12, *values.shape)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = bare_axes(figure.subplots(), title, xlabel, ylabel)
    image = axes.imshow(values, cmap="RdBu_r" if signed else "Blues",
                        vmin=-most if signed else 0, vmax=most)
    if column_labels is not None:
        axes.set_xticks(range(values.shape[1]), column_labels, fontsize=8)
    if row_labels is not None:
        axes.set_yticks(range(values.shape[0]), row_labels, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
