"""Figures from numbers and labels, never from a model; each function returns a Figure.

The palette is Okabe and Ito's, whose colours remain distinct for colour-blind readers. Everything
that is drawn carries information.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Prerequisites: utils.py
Next: losses.py
Source: Tufte 1983 (data-ink); Okabe & Ito 2008 (colours)
"""

import itertools
import math
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, LogLocator

from utils import atomic_write

FEW_POINTS = 30  # lines with at most this many points show each point
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class PlainFigure(Figure):
    """A figure whose texts are shown literally.

    Plain matplotlib treats text between two dollar signs as a formula, and fails if it cannot parse
    it. Names of files, tokens and titles may contain dollar signs.
    """

    def draw(self, renderer):
        """Draws the figure; showing and saving both end up here."""
        dollars_as_text_(self)
        super().draw(renderer)


def dollars_as_text_(figure):
    """Makes matplotlib show a figure's texts literally, except for the numbers on its axes.

    A logarithmic axis writes its powers of ten as formulas.
    """
    numbers = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            # asking for the ticks creates all labels that the axis will have
            ticks = [(axis.major, axis.get_major_ticks()), (axis.minor, axis.get_minor_ticks())]
            for settings, some in ticks:
                if not isinstance(settings.formatter, (FixedFormatter, FuncFormatter)):
                    numbers |= {label for tick in some for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        text.set_parse_math(text in numbers)


def save(figure, path):
    """Writes a figure as PNG; the same figure gives the same bytes."""
    dollars_as_text_(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def bare_axes(axes, title, xlabel, ylabel):
    """Sets a title and labels, and removes the upper and right frame. Returns the axes."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_lines(axes, lines, levels):
    """Draws lines {name: (x, y)} and horizontal reference lines {name: y}.

    Lines with few values show them as points joined by dots, because nothing was measured between
    them.
    """
    for (name, (x, y)), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        style = {"linewidth": 1.2}
        if len(x) <= FEW_POINTS:
            style = {"marker": "o", "markersize": 4, "linestyle": ":", "linewidth": 0.8}
        axes.plot(x, y, color=colour, label=name, **style)

    # A level's name is written below it if it is under all lines, and above it otherwise.
    lowest = min((value for _, y in lines.values() for value in y), default=0.0)
    for name, level in levels.items():
        axes.axhline(level, color="0.55", linewidth=1, linestyle="--")
        is_below = level < lowest
        axes.annotate(name, (0.99, level), xycoords=("axes fraction", "data"), ha="right",
                      xytext=(0, -2 if is_below else 2), textcoords="offset points",
                      va="top" if is_below else "bottom", color="0.35", fontsize=9)

    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)


def curve(lines, *, title, xlabel, ylabel, levels=None):
    """Lines over a common x axis, with a legend if there are several.

    lines: {name: (x, y)}, sequences of equal length. levels: {name: y}, horizontal reference lines.
    Returns a Figure.
    """
    figure = PlainFigure(figsize=(7, 4.2), layout="constrained")
    draw_lines(bare_axes(figure.subplots(), title, xlabel, ylabel), lines, levels or {})
    return figure


def training_curves(rows, *, name, unit, levels):
    """The curves of a training run, one below the other.

    They show the losses; the excess of each kind of word over its floor, if it is known; and,
    smaller, the learning rate and the gradient's norm.
    rows: a run's metrics, dicts with some of train_loss, val_loss, above_floor ({category: nats}),
    lr and grad_norm. name: of the text. unit: what a token is. levels: {name: nats}, for reference.
    Returns a Figure.
    """

    def over_steps(key):
        having = [row for row in rows if key in row]
        return [row["step"] for row in having], [row[key] for row in having]

    # What each panel shows: (height, lines, label, levels)
    losses = {"training": over_steps("train_loss"), "validation": over_steps("val_loss")}
    parts = [(3, losses, f"loss (nats/{unit})", levels)]
    steps, above = over_steps("above_floor")
    if above:
        # Without the first value, from before training, which would dwarf the others
        excesses = {kind: (steps[1:], [nats[kind] for nats in above[1:]])
                    for kind in above[0] if kind != "all"}
        parts.append((3, excesses, f"above the floor (nats/{unit})", {"the floor": 0.0}))
    parts.append((1, {"": over_steps("lr")}, "learning rate", {}))
    parts.append((1, {"": over_steps("grad_norm")}, "gradient norm", {}))

    heights = [height for height, *_ in parts]
    figure = PlainFigure(figsize=(7, 1.3 * sum(heights)), layout="constrained")
    rows_of_axes = figure.subplots(len(parts), sharex=True, height_ratios=heights)
    for axes, (_, lines, ylabel, marks) in zip(rows_of_axes, parts, strict=True):
        draw_lines(bare_axes(axes, "", "", ylabel), lines, marks)
    figure.axes[-1].set_xlabel("step")
    figure.axes[0].set_title(f"{name}: {rows[-1]['val_loss']:.3f} nats/{unit} on unseen text",
                             loc="left", fontsize=11)
    return figure


def dot_rows(rows, *, title, xlabel):
    """One row for each thing that was measured, with a dot and an interval for each contestant, on
    a logarithmic axis with a line at 1.

    rows: {name: {contestant: (value, low, high)}}, positive numbers, such as times over a floor.
    Each contestant has a colour, in the order in which they first occur. Returns a Figure.
    """
    contestants = list(dict.fromkeys(each for row in rows.values() for each in row))
    figure = PlainFigure(figsize=(9, 1.3 + 0.3 * len(rows)), layout="constrained")
    axes = bare_axes(figure.subplots(), title, xlabel, "")
    axes.set_xscale("log")
    axes.axvline(1, color="0.55", linewidth=1, linestyle="--")

    for contestant, colour in reversed(list(zip(contestants, COLOURS, strict=False))):
        for y, row in enumerate(rows.values()):
            if contestant in row:
                value, low, high = row[contestant]
                axes.plot([low, high], [y, y], color=colour, linewidth=4, alpha=0.4)
                axes.plot(value, y, "o", color=colour, markersize=5)
        axes.plot([], [], "o", color=colour, label=contestant)
    if len(contestants) > 1:
        axes.legend(frameon=False, fontsize=9, reverse=True)  # drawn last, the first lies on top

    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 60) for name in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")
    return figure


def draw_intervals(axes, rows, colours):
    """Draws a dot with a bar for each row {name: (value, low, high)}, from top to bottom."""
    for y, ((value, low, high), colour) in enumerate(zip(rows.values(), colours, strict=True)):
        axes.plot([low, high], [y, y], color=colour, linewidth=4, alpha=0.4)
        axes.plot(value, y, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def ranking(values, labels, low, high, *, xlabel, level=0.95, most=20):
    """Numbers with their intervals, the largest at the top.

    The title names the first one only if its interval lies above all others.
    values, low, high: one for each label, in any shape, such as [layer, head]. level: of the
    intervals. most: the number of rows to show. Returns a Figure.
    """
    values, low, high = (np.asarray(each, dtype=float).ravel() for each in (values, low, high))
    order = np.argsort(-values, kind="stable")
    rows = {labels[row]: (values[row], low[row], high[row]) for row in order[:most]}
    key = f"dot: mean; bar: {100 * level:g} % interval"
    if len(order) > most:
        key += f"; {len(order) - most} smaller not shown"

    figure = PlainFigure(figsize=(5.5, 1.3 + 0.24 * len(rows)), layout="constrained")
    axes = bare_axes(figure.subplots(), describe_first(values, labels, low, high),
                     f"{xlabel}\n{key}", "")
    axes.axvline(0, color="0.2", linewidth=0.8)
    draw_intervals(axes, rows, [COLOURS[0]] * len(rows))
    for y, row in enumerate(rows.values()):
        value, lowest, highest = np.round(row, 2) + 0.0  # no minus before a zero
        axes.annotate(f"{value:.2f}  ({lowest:.2f} to {highest:.2f})", (1.02, y), va="center",
                      xycoords=("axes fraction", "data"), fontsize=8, color="0.35")
    return figure


def describe_first(values, labels, low, high):
    """Which label has the largest value, in words; none, if another's interval reaches its own.

    values, low, high: [row], one for each label.
    """
    first, *others = np.argsort(-values, kind="stable")
    if not others:
        return f"{labels[first]}: {values[first]:.2f}"
    rival = max(others, key=lambda row: high[row])
    if low[first] > high[rival]:
        return (f"{labels[first]} stands out with {values[first]:.2f}; "
                f"the next, {labels[others[0]]}, has {values[others[0]]:.2f}")
    return f"None stands out: the intervals of {labels[first]} and {labels[rival]} overlap"


def colour_scale(values):
    """(values masked where not finite, keywords of `imshow`), to show a matrix as colours.

    Zero is white: the middle of a symmetric scale if there are negative values, otherwise the lower
    end.
    """
    values = np.ma.masked_invalid(np.ma.asarray(values, dtype=float))
    most = np.abs(values).max() if values.count() else 1.0
    if values.count() and values.min() < 0:
        return values, {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    return values, {"cmap": "Blues", "vmin": 0, "vmax": most}


def heatmap(values, *, title, xlabel, ylabel, row_labels=None, column_labels=None):
    """A matrix as colours. values: [rows, columns], not negative or of both signs.

    Values of both signs get a scale that is symmetric about a white zero. Cells that are masked or
    not finite stay blank. Returns a Figure.
    """
    values, scale = colour_scale(values)
    side = 1.6 + 0.19 * max(12, *values.shape)
    figure = PlainFigure(figsize=(side + 1, side), layout="constrained")
    axes = bare_axes(figure.subplots(), title, xlabel, ylabel)
    image = axes.imshow(values, **scale)
    if column_labels is not None:
        axes.set_xticks(range(values.shape[1]), column_labels, fontsize=8)
    if row_labels is not None:
        axes.set_yticks(range(values.shape[0]), row_labels, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def write_cells(axes, values, texts, scale):
    """Writes texts [row][column] into the cells of an image, white on dark cells."""
    for (row, column), value in np.ndenumerate(np.ma.filled(values, 0.0)):
        dark = abs(value) > 0.6 * scale["vmax"]
        axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=7,
                  color="white" if dark else "0.2")


def head_grid(values, *, title, unit):
    """A number for each head, as a grid with layers from top to bottom.

    values: [layer, head]; values that are not finite stay blank. unit: the colour bar's label.
    Returns a Figure.
    """
    values, scale = colour_scale(values)
    n_layers, n_heads = values.shape
    texts = [[f"{value:.2f}" if np.isfinite(value) else "" for value in row]
             for row in values.filled(np.nan)]

    figure = PlainFigure(figsize=(2.6 + 0.62 * n_heads, 1.6 + 0.5 * n_layers), layout="constrained")
    axes = bare_axes(figure.subplots(), title, "head", "layer")
    image = axes.imshow(values, **scale, aspect="auto")
    write_cells(axes, values, texts, scale)
    axes.set_xticks(range(n_heads))
    axes.set_yticks(range(n_layers))
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def dla_bar(values, labels, *, title, xlabel, low=None, high=None, most=20):
    """Bars from zero that show how much each part of a model adds, the largest at the top.

    values, low, high: [row]; low and high are drawn as whiskers. labels: one for each row, such as
    those of `attribution.direct_logit_attribution`, which are shown in words. most: the number of
    rows to show. The rest is summed into one more bar, so that the bars still add up to the total.
    A value of zero gets no bar, unless all are zero. Returns a Figure.
    """
    values = np.asarray(values, dtype=float)
    n_bars = max(1, np.count_nonzero(values))
    order = np.argsort(-np.abs(values), kind="stable")[:n_bars]  # by size, without zeros
    shown = sorted(order[:most], key=lambda row: -values[row])
    names = [describe_part(labels[row]) for row in shown]
    lengths = [values[row] for row in shown]
    if len(order) > most:
        names.append(f"{len(order) - most} others")
        lengths.append(values[order[most:]].sum())

    figure = PlainFigure(figsize=(7, 1.2 + 0.26 * len(names)), layout="constrained")
    axes = bare_axes(figure.subplots(), title, xlabel, "")
    colours = [COLOURS[0] if length >= 0 else COLOURS[1] for length in lengths]
    axes.barh(range(len(names)), lengths, color=colours, height=0.7)
    if low is not None:
        for y, row in enumerate(shown):
            axes.plot([low[row], high[row]], [y, y], color="0.2", linewidth=1)

    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    return figure


def describe_part(label):
    """The name of a part of a model, such as 0_attn_out or ln_bias, in words; others stay."""
    names = {"embed": "token embedding", "pos_embed": "position embedding",
             "ln_bias": "bias of the last LayerNorm", "b_U": "bias of the unembedding",
             "biases": "biases of the blocks"}
    layer, _, part = label.partition("_")
    if layer.isdecimal() and part in ("attn_out", "mlp_out"):
        return f"{'attention' if part == 'attn_out' else 'MLP'} of block {layer}"
    return names.get(label, label)


def lens_table(probs, tokens, *, title, row_labels, column_labels):
    """The most likely token of each row of a lens at each position, coloured by its probability.

    probs: [row, pos]. tokens: [row][pos], texts. row_labels: one for each row. column_labels: the
    tokens of the text. The last row, the model's own prediction, is at the top. Returns a Figure.
    """
    values, scale = colour_scale(np.asarray(probs, dtype=float)[::-1])
    scale["vmax"] = 1.0
    n_rows, n_pos = values.shape
    texts = [[show_spaces(token) for token in row] for row in tokens[::-1]]

    figure = PlainFigure(figsize=(1.8 + 0.62 * n_pos, 1.4 + 0.36 * n_rows), layout="constrained")
    axes = bare_axes(figure.subplots(), title,
                     "the text so far, token by token (· is a space, ↵ the end of a line)",
                     "where the stream is read")
    image = axes.imshow(values, **scale, aspect="auto")
    write_cells(axes, values, texts, scale)
    axes.set_xticks(range(n_pos), [show_spaces(token) for token in column_labels], fontsize=8)
    axes.set_yticks(range(n_rows), [describe_stream(label) for label in row_labels[::-1]],
                    fontsize=8)
    figure.colorbar(image, ax=axes, label="probability of the likeliest next token (shown)")
    return figure


def describe_stream(label):
    """A label such as 2_mid, 1_pre or final_post in words; any other label stays as it is."""
    layer, _, place = label.partition("_")
    if label == "final_post":
        return "after the last block"
    if not layer.isdecimal() or place not in ("pre", "mid"):
        return label
    if place == "mid":
        return f"block {layer}, after attention"
    return "embedding" if layer == "0" else f"after block {int(layer) - 1}"


def show_spaces(token):
    """A token as text with visible spaces and newlines."""
    return token.replace("\n", "↵").replace(" ", "·")


def attention_grid(patterns, *, title, labels, tokens=None):
    """Attention patterns side by side, on one scale from 0 to 1.

    patterns: [pattern, query_pos, key_pos]; what a query cannot see stays blank. If there are fewer
    queries than keys, they are the last positions. labels: one for each pattern. tokens: the texts
    of all keys. Returns a Figure.
    """
    patterns = np.asarray(patterns, dtype=float)
    n_before = patterns.shape[2] - patterns.shape[1]  # keys before the first query
    future = np.triu(np.ones(patterns.shape[1:], dtype=bool), n_before + 1)

    columns = min(4, len(patterns))
    rows = math.ceil(len(patterns) / columns)
    figure = PlainFigure(figsize=(1 + 2.3 * columns, 1 + 2.3 * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)

    for axes, pattern, label in itertools.zip_longest(grid.flat, patterns, labels):
        if pattern is None:
            axes.set_visible(False)
            continue
        seen = np.ma.masked_array(pattern, future)
        bare_axes(axes, label, "", "")
        image = axes.imshow(seen, cmap="Blues", vmin=0, vmax=1)
        if tokens is not None:
            texts = [show_spaces(token) for token in tokens]
            axes.set_xticks(range(len(texts)), texts, fontsize=6, rotation=90)
            axes.set_yticks(range(len(texts) - n_before), texts[n_before:], fontsize=6)

    figure.supxlabel("key (what is looked at)", fontsize=9)
    figure.supylabel("query (who looks)", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention")
    return figure
