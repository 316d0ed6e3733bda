"""Figures show the given numbers and words, and have the same bytes each time."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from plotting import (
    COLOURS,
    attention_grid,
    colour_scale,
    curve,
    describe_part,
    describe_stream,
    dla_bar,
    dot_rows,
    head_grid,
    heatmap,
    lens_table,
    ranking,
    save,
    training_curves,
)

LINES = {"train": ([0, 1, 2], [3.0, 2.0, 1.5]), "validation": ([0, 2], [3.1, 2.2])}
WORDS = {"title": "The loss falls", "xlabel": "step", "ylabel": "nats a token"}


def image_of(values, **labels):
    """The coloured image inside a heat map of `values`."""
    return heatmap(values, **WORDS, **labels).axes[0].images[0]


def tick_labels(axis):
    """The texts at the ticks of an x or y axis."""
    return [text.get_text() for text in axis.get_ticklabels()]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    def draw():
        """A figure of lines and one of images, small, as the time goes into their pixels."""
        figures = [curve(LINES, **WORDS, levels={"floor": 1.2}),
                   attention_grid(np.full((2, 2, 2), 0.4), title="Patterns", labels=["a", "b"])]
        for figure in figures:
            figure.set_size_inches(4, 3)
        return figures

    for number, same_figures in enumerate(zip(draw(), draw(), strict=True)):
        contents = []
        for figure in same_figures:
            save(figure, tmp_path / "figure.png")
            contents.append((tmp_path / "figure.png").read_bytes())
        assert contents[0].startswith(b"\x89PNG")
        assert contents[0] == contents[1], f"figure {number} has other bytes when drawn again"


def test_a_few_values_are_points_and_many_are_a_line():
    few = (list(range(30)), [1.0] * 30)
    many = (list(range(31)), [1.0] * 31)
    lines = curve({"few": few, "many": many}, **WORDS).axes[0].lines
    assert [line.get_marker() for line in lines] == ["o", "None"]


def test_a_figure_carries_its_title_and_the_names_of_its_axes():
    for figure in (curve(LINES, **WORDS), heatmap([[0.0, 1.0], [2.0, -3]], **WORDS)):
        axes = figure.axes[0]
        assert axes.get_title(loc="left") == WORDS["title"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == (WORDS["xlabel"], WORDS["ylabel"])


def test_a_curve_draws_each_line_with_its_numbers_and_names_it():
    axes = curve(LINES, **WORDS).axes[0]
    for line, (name, (x, y)) in zip(axes.get_lines(), LINES.items(), strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == x and list(line.get_ydata()) == y
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(LINES)
    assert len({line.get_color() for line in axes.get_lines()}) == len(LINES)


def test_no_line_is_left_out_where_there_are_more_than_colours():
    n_lines = len(COLOURS) + 1
    figure = curve({f"line {i}": ([0, 1], [i, i]) for i in range(n_lines)}, **WORDS)
    assert len(figure.axes[0].get_lines()) == n_lines


def test_a_level_is_drawn_at_its_height_and_named():
    axes = curve(LINES, **WORDS, levels={"floor": 1.25}).axes[0]
    assert list(axes.get_lines()[-1].get_ydata()) == [1.25, 1.25]
    assert [text.get_text() for text in axes.texts] == ["floor"]


def test_colours_start_at_zero_or_lie_evenly_about_it():
    rows = [([[1.0, 2.0], [3.0, 4.0]], (0, 4)), ([[0.0, 0.5]], (0, 0.5)),
            ([[1.0, -3.0], [2.0, 0.0]], (-3, 3)), ([[-1.0, -2.0]], (-2, 2)),
            ([[-1.0, 5.0]], (-5, 5))]
    for values, limits in rows:
        found = colour_scale(values)[1]
        assert (found["vmin"], found["vmax"]) == limits, f"the scale of {values} is {found}"


def test_zero_is_nearly_white_and_the_largest_value_is_not():
    for values in ([[1.0, 2.0]], [[1.0, -3.0]]):
        image = image_of(values)
        assert min(image.cmap(image.norm(0.0))[:3]) > 0.95, values
        assert min(image.cmap(image.norm(image.get_clim()[1]))[:3]) < 0.5, values


def test_opposite_signs_have_different_colours():
    image = image_of([[1.0, -1.0]])
    (red, _, blue, _), (red_below, _, blue_below, _) = (image.cmap(image.norm(v)) for v in (1, -1))
    assert red > blue and red_below < blue_below


def test_a_heat_map_shows_the_numbers_at_their_row_and_column():
    values = torch.arange(6.0).view(2, 3)
    labels = {"row_labels": ["a", "b"], "column_labels": ["x", "y", "z"]}
    axes = heatmap(values, **WORDS, **labels).axes[0]
    assert np.array_equal(axes.images[0].get_array(), values.numpy())
    assert tick_labels(axes.yaxis) == ["a", "b"]
    assert tick_labels(axes.xaxis) == ["x", "y", "z"]
    assert axes.images[0].origin == "upper"  # row 0 is at the top


def test_nan_and_masked_cells_stay_blank_and_do_not_stretch_the_scale():
    for hidden in (np.array([[1.0, np.nan], [2.0, 3.0]]),
                   np.ma.masked_greater([[1.0, 99.0], [2.0, 3.0]], 50)):
        image = image_of(hidden)
        assert image.get_clim() == (0, 3), f"the scale of {hidden}"
        blank = np.ma.getmaskarray(image.get_array()).tolist()
        assert blank == [[False, True], [False, False]], f"what is blank of {hidden}"


@pytest.mark.slow
def test_drawing_needs_neither_a_window_nor_a_model(tmp_path):
    program = ("import sys, plotting\n"
               "figure = plotting.heatmap([[1.0]], title='', xlabel='', ylabel='')\n"
               "plotting.save(figure, sys.argv[1])\n"
               "print(sorted({'model', 'matplotlib.pyplot', 'tkinter'} & set(sys.modules)))")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "figure.png"], cwd=root,
                          capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and (tmp_path / "figure.png").exists()


def test_a_grid_of_heads_shows_each_number_in_its_cell():
    axes = head_grid([[0.1, -0.5], [2.0, 0.0]], title="A head", unit="nats").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.10", "-0.50", "2.00", "0.00"]
    assert axes.images[0].get_clim() == (-2, 2)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_a_head_without_a_number_gets_none():
    axes = head_grid([[0.0, np.nan], [np.inf, 0.5]], title="", unit="").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.00", "", "", "0.50"]


def test_rows_of_dots_show_each_contestant_in_its_colour():
    figure = dot_rows({"one": {"a": (2.0, 0.5, 9.0), "b": (3.0, 3.0, 3.0)},
                       "two": {"a": (0.9, 0.9, 0.9)}}, title="", xlabel="")
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert low < 0.5 and high > 9 and axes.get_xscale() == "log"
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    colours = {line.get_xdata()[0]: line.get_color() for line in dots}
    assert colours[2.0] == colours[0.9] != colours[3.0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"a", "b"}


def test_a_ranking_names_its_first_only_if_its_interval_lies_above_all_others():
    middle = [0.2, 1.0, 0.1]
    far = ranking(middle, "abc", [0.1, 0.9, 0.0], [0.3, 1.1, 0.2], xlabel="nats").axes[0]
    assert far.get_title("left") == "b stands out with 1.00; the next, a, has 0.20"

    # the third is uncertain: its interval reaches that of the first, though not its value
    near = ranking(middle, "abc", [0.1, 0.9, 0.0], [0.3, 1.1, 0.95], xlabel="nats").axes[0]
    assert near.get_title("left") == "None stands out: the intervals of b and c overlap"
    alone = ranking([0.5], ["a"], [0.4], [0.6], xlabel="nats").axes[0]
    assert alone.get_title("left") == "a: 0.50"


def test_a_ranking_has_the_largest_on_top_and_each_interval_at_its_own_row():
    values = np.array([[0.2, 1.0], [0.1, 0.4]])  # [layer, head]
    axes = ranking(values, "abcd", values - 0.05, values + 0.05, xlabel="nats", most=3).axes[0]
    assert tick_labels(axes.yaxis) == ["b", "d", "a"] and axes.yaxis_inverted()
    bars = [line.get_xdata() for line in axes.lines if line.get_alpha()]
    assert np.array(bars) == pytest.approx(np.array([[0.95, 1.05], [0.35, 0.45], [0.15, 0.25]]))
    assert "95 % interval" in axes.get_xlabel() and "1 smaller" in axes.get_xlabel()


def test_the_bars_of_an_attribution_add_up_to_the_whole():
    values = [1.0, -2.0, 0.5, 0.25]
    for most in (1, 2, 3, 9):
        axes = dla_bar(values, list("abcd"), title="", xlabel="nats", most=most).axes[0]
        widths = [bar.get_width() for bar in axes.patches]
        assert sum(widths) == pytest.approx(sum(values)), f"{most} bars add up to {sum(widths)}"
        names = tick_labels(axes.yaxis)
        assert "b" in names and (f"{4 - most} others" in names) is (most < 4), names
        shown = widths[: min(most, 4)]
        assert shown == sorted(shown, reverse=True), f"the bars from the top are {shown}"


def test_a_part_that_adds_nothing_has_no_bar():
    axes = dla_bar([1.0, 0.0, -2.0], list("abc"), title="", xlabel="nats").axes[0]
    assert tick_labels(axes.yaxis) == ["a", "c"]


def test_each_bar_has_its_own_whisker():
    figure = dla_bar([1.0, -2.0], ["a", "b"], title="", xlabel="", low=[0.5, -3], high=[1.5, -1])
    lines = figure.axes[0].get_lines()
    whiskers = [(list(line.get_xdata()), line.get_ydata()[0]) for line in lines]
    assert whiskers[:2] == [([0.5, 1.5], 0), ([-3, -1], 1)]


def test_a_lens_table_has_the_last_row_on_top_and_shows_spaces_and_line_ends():
    figure = lens_table([[0.1, 0.2], [0.9, 0.8]], [["a", " b"], ["c", "\n"]], title="",
                        row_labels=["0_pre", "mine"], column_labels=["x", " y"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["c", "↵", "a", "·b"]
    assert tick_labels(axes.yaxis) == ["mine", "embedding"]
    assert axes.images[0].get_array().tolist() == [[0.9, 0.8], [0.1, 0.2]]
    assert axes.images[0].get_clim() == (0, 1)


def test_parts_of_a_model_are_said_in_words():
    words = {"embed": "token embedding", "3_attn_out": "attention of block 3",
             "11_mlp_out": "MLP of block 11", "ln_bias": "bias of the last LayerNorm",
             "L0H1": "L0H1", "x_mlp_out": "x_mlp_out"}
    assert {label: describe_part(label) for label in words} == words
    axes = dla_bar([1.0, -2.0], ["0_mlp_out", "mine"], title="", xlabel="").axes[0]
    assert tick_labels(axes.yaxis) == ["MLP of block 0", "mine"]


def test_places_of_the_stream_are_said_in_words():
    words = {"0_pre": "embedding", "0_mid": "block 0, after attention", "3_pre": "after block 2",
             "12_mid": "block 12, after attention", "final_post": "after the last block",
             "mine": "mine", "x_pre": "x_pre"}
    assert {label: describe_stream(label) for label in words} == words


def test_attention_to_the_future_stays_blank_and_all_patterns_share_a_scale():
    patterns = np.stack([np.tril(np.full((3, 3), 0.3)), np.eye(3)])
    figure = attention_grid(patterns, title="", labels=["L0H0", "L0H1"])
    for axes, label in zip(figure.axes[:2], ["L0H0", "L0H1"], strict=True):
        assert axes.get_title(loc="left") == label and axes.images[0].get_clim() == (0, 1)
        hidden = np.ma.getmaskarray(axes.images[0].get_array())
        assert hidden.tolist() == [[False, True, True], [False, False, True], [False] * 3]


def test_the_last_queries_of_a_pattern_see_all_keys_up_to_their_own():
    figure = attention_grid(np.full((1, 2, 4), 0.3), title="", labels=["L0H0"], tokens=list("abcd"))
    axes = figure.axes[0]
    hidden = np.ma.getmaskarray(axes.images[0].get_array())
    assert hidden.tolist() == [[False, False, False, True], [False] * 4]
    assert tick_labels(axes.xaxis) == list("abcd")
    assert tick_labels(axes.yaxis) == ["c", "d"]


DOLLARS = ["$\\frac$", "$$", r"\$x$", "$5"]  # the first would be refused as a formula


def figures_with(names):
    """{function: its figure, in which each text that it takes is one of the names}, some of them
    from other code, which makes its own axes."""
    title, other, third, last = names
    values = np.eye(2)
    rows = [{"step": step, "train_loss": 1.0, "val_loss": 2.0, "lr": 0.1, "grad_norm": 1.0,
             "above_floor": {title: 1.0, other: 2.0, "all": 3.0}} for step in (0, 1)]
    words = {"title": title, "xlabel": other}
    own = Figure()
    axes = own.subplots()
    axes.plot([1, 100], [1, 100], label=title)
    axes.plot([1, 100], [1, 50], label=other)
    axes.text(2, 2, third)
    axes.set_xticks([1, 2], [title, other])
    axes.legend(title=last)
    own.suptitle(title)
    return {
        "curve": curve({title: ([1], [2]), other: ([1], [3])}, ylabel=third, levels={last: 1.0},
                       **words),
        "training_curves": training_curves(rows, name=title, unit=other, levels={third: 1.0}),
        "dot_rows": dot_rows({third: {last: (1.0, 0.5, 2.0), other: (1.0, 0.5, 2.0)}}, **words),
        "ranking": ranking([1.0, 2.0], names[:2], [0.5, 1.5], [1.2, 2.2], xlabel=third),
        "heatmap": heatmap(values, ylabel=third, row_labels=[title, last],
                           column_labels=[other, third], **words),
        "head_grid": head_grid(values, title=title, unit=other),
        "dla_bar": dla_bar([1.0, 2.0], [third, last], **words),
        "lens_table": lens_table(values, [names[:2], names[2:]], title=title,
                                 row_labels=[other, third], column_labels=[title, last]),
        "attention_grid": attention_grid(values[None], title=title, labels=[other],
                                         tokens=[third, last]),
        "another": own,
    }


@pytest.mark.slow
def test_dollars_are_text_in_every_figure(tmp_path):
    """A figure with dollars has the pixels of one in which matplotlib shows them as text."""
    with matplotlib.rc_context({"text.parse_math": False}):
        wanted = figures_with(DOLLARS)
    for name, figure in figures_with(DOLLARS).items():
        for each in (figure, wanted[name]):
            each.set_size_inches(4, 3)
        if name != "another":  # shown without save, as in a notebook
            figure.canvas.draw()
        save(figure, tmp_path / "found.png")
        with matplotlib.rc_context({"text.parse_math": False}):
            wanted[name].savefig(tmp_path / "wanted.png", dpi=150, metadata={"Software": None})
        found = (tmp_path / "found.png").read_bytes()
        assert found == (tmp_path / "wanted.png").read_bytes(), name


def test_powers_of_ten_at_an_axis_stay_formulas(tmp_path):
    figure = curve({"$a": ([1, 1000], [1, 1000])}, **WORDS)
    axes = figure.axes[0]
    axes.set_xscale("log")
    for _ in range(2):
        save(figure, tmp_path / "figure.png")
        labels = axes.get_xticklabels()
        assert any("10^{2}" in label.get_text() for label in labels)
        assert all(label.get_parse_math() for label in labels)
    assert not axes.title.get_parse_math()


def test_the_powers_of_ten_of_a_long_axis_stay_formulas(tmp_path):
    """Some of its ticks are made only when they are asked for."""
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 3000], [1e-8, 30])
    axes.set_xscale("log")
    axes.set_yscale("log")
    save(figure, tmp_path / "long.png")
    labels = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
    raw = [label.get_text() for label in labels if not label.get_parse_math()]
    assert len(labels) > 10 and not raw, f"shown with their dollars: {raw}"
