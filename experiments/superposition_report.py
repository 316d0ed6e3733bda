"""What feature_superposition_toy_model says of its measures: the table's lines, and the figures of
arrangements in the plane, plateaus and phases.

Chapter: COURSE_ROADMAP.md, 14 (superposition)
Read before: plotting.py; after: nothing
Source: Elhage et al. 2022, Toy models of superposition
"""

import functools
import math
from dataclasses import dataclass

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from experiments.common import over_seeds
from experiments.superposition_model import ARRANGEMENTS
from plotting import COLOURS, bare_axes, draw_lines

PHASE_COLOURS = ("0.88", COLOURS[0], COLOURS[4])  # in the order of ARRANGEMENTS


@dataclass(frozen=True)
class Table:
    """Makes the lines: each is over all seeds, and holds where it does for each of them.

    found: the measures of each seed, as dicts in dicts, in which keys make a path. judged: False
    leaves open whether a line holds.
    """

    found: list
    judged: bool

    def values(self, *path):
        """What lies there, of each seed."""
        return [functools.reduce(dict.__getitem__, path, each) for each in self.found]

    def mean(self, *path):
        """Of the seeds, as text."""
        values = self.values(*path)
        return f"{sum(values) / len(values):.3g}"

    def line(self, text, path, control, *, at_least=None, at_most=None):
        """A Claim: the mean and the range of the seeds, held against a mark from one side."""
        if at_least is None:
            held, mark = (lambda value: value <= at_most), f"at most {at_most:g}"
        else:
            held, mark = (lambda value: value >= at_least), f"at least {at_least:g}"
        return over_seeds(text, self.values(*path), held if self.judged else None,
                          control=f"{mark}; {control}",
                          mark=at_most if at_least is None else at_least)


def claims_of(found, *, judged=True):
    """The table's lines, [Claim], from the measures of each seed."""
    table = Table(found, judged)
    return [*of_polytopes(table), *of_geometry(table), *of_phases(table), *of_pairs(table)]


def of_polytopes(table):
    """Five features in the plane."""
    here, mean = "polytopes", functools.partial(table.mean, "polytopes")
    return [
        table.line("5 features in 2 dimensions, density 1: D of the two most important, the lesser",
                   (here, "dense"), f"the others' at most {mean('dense_others')}, untrained "
                   f"{mean('untrained_dense')}", at_least=0.95),
        table.line("density .26, four features: how far their D are from 1/2, at most",
                   (here, "pairs"), f"untrained {mean('untrained_pairs')}", at_most=0.03),
        table.line("and they are antipodal pairs: each one's cosine with its opposite, at most",
                   (here, "antipodes"), "two bases 45 degrees apart have D of 1/2 too",
                   at_most=-0.9),
        table.line("density .05, all five share alike: how far the D are from 2/5, at most",
                   (here, "pentagon"), f"untrained {mean('untrained_pentagon')}, linear "
                   f"{mean('linear_pentagon')}", at_most=0.03),
        table.line("and it is a pentagon: how far neighbours are from 72 degrees apart, at most",
                   (here, "gaps"), f"untrained {mean('untrained_gaps')}", at_most=5.0),
        table.line("without the ReLU nothing is shared: sum of |W_i|^2 at any density, at most",
                   (here, "linear_kept"), f"with it {mean('kept')} at .05", at_most=2.05),
    ]


def of_geometry(table):
    """Many features in twenty dimensions."""
    here, mean = "geometry", functools.partial(table.mean, "geometry")
    return [
        table.line("200 features in 20, density 1: how far D* = m / |W|^2 is from 1",
                   (here, "dense"), f"untrained {mean('untrained_dense')}", at_most=0.03),
        table.line("1 / density 2.5 to 3.6, a plateau: how far D* is from 1/2, at most",
                   (here, "plateau"), f"linear {mean('linear')}", at_most=0.03),
        table.line("and it is flat: slope of ln D* over ln density",
                   (here, "slope"), f"beyond it {mean('slope_after')}", at_most=0.2),
        table.line("and of pairs: share of those kept with D within .03 of 1/2, and an antipode",
                   (here, "halves"), f"untrained {mean('untrained_halves')}", at_least=0.9),
    ]


def of_phases(table):
    """One feature too many."""
    lines = []
    for name in table.found[0]["phases"]:
        densities, importances, single, away, everywhere = (
            table.mean("phases", name, key) for key in (
                "density_shuffled", "importance_shuffled", "single", "away", "agree_all"))
        lines.append(table.line(
            f"phases of ({name}): share of cells, boundaries left out, that are as the closed form",
            ("phases", name, "agree"), f"these are {away} of all, of which {everywhere}; its "
            f"densities shuffled {densities}, its importances {importances}; one start {single}",
            at_least=0.9))
    return lines


def of_pairs(table):
    """Features that come in pairs."""
    return [table.line(f"pairs that {meeting} meet: share that is {angle}",
                       ("pairs", meeting, angle), "pairs that meet by chance "
                       + table.mean("pairs", "by chance", angle), at_least=0.95)
            for meeting, angle in (("never", "antipodal"), ("always", "orthogonal"))]


def figures(result):
    """{name: Figure} of a run's result."""
    first = result["seeds"][0]
    return {"polytopes": plane(first["polytopes"]), "plateau": plateau(result["seeds"]),
            "phases": diagrams(first["phases"])}


def plane(found):
    """Five directions in the plane at each density, one panel each."""
    kept = [sum(math.hypot(*column) > 0.5 for column in zip(*W, strict=True)) for W in found["W"]]
    n_columns = 5
    n_rows = -(-len(kept) // n_columns)
    figure = Figure(figsize=(9.5, 0.9 + 2.1 * n_rows), layout="constrained")
    figure.suptitle(f"Two dimensions keep {kept[0]} features that are always there, and "
                    f"{kept[-1]} that are rare", x=0.01, ha="left", fontsize=12)
    most = 1.1 * max(math.hypot(*column) for W in found["W"] for column in zip(*W, strict=True))
    for axes, W, density in zip(figure.subplots(n_rows, n_columns).flat, found["W"],
                                found["density"], strict=True):
        for i, (x, y) in reversed(list(enumerate(zip(*W, strict=True)))):
            axes.plot([0, x], [0, y], color=COLOURS[i], linewidth=2)
            axes.plot(x, y, "o", color=COLOURS[i], markersize=5, label=f"{0.9**i:.2f}")
        axes.set_title(f"density {density:.2f}", fontsize=10)
        axes.set(xlim=(-most, most), ylim=(-most, most), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("0.85")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="a line from the origin is a feature's "
                  "direction W_i; its importance:", title_fontsize=9, fontsize=9, frameon=False,
                  loc="outside lower center", ncols=5)
    return figure


def plateau(seeds):
    """D* of each seed, and D of every feature of the first, against 1 / density."""
    first = seeds[0]["geometry"]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    on = [rarity for rarity, inside in zip(first["rarity"], first["on"], strict=True) if inside]
    at = sum(star for star, inside in zip(first["star"], first["on"], strict=True) if inside)
    axes = bare_axes(figure.subplots(), f"Features of density 1/{on[0]:.1f} to 1/{on[-1]:.1f} get "
                     f"{at / len(on):.2f} of a dimension each", "1 / density (log scale)",
                     "dimensions per feature")
    dots = [(x, D) for x, row, lengths in zip(first["rarity"], first["D"], first["length"],
                                              strict=True)
            for D, length in zip(row, lengths, strict=True) if length > 0.5]
    lines = {f"D* = m / |W|², seed {each['seed']}":
             (each["geometry"]["rarity"], each["geometry"]["star"]) for each in seeds}
    draw_lines(axes, lines, {"|W|² = m": 1.0, "|W|² = 2 m": 0.5})
    axes.scatter(*zip(*dots, strict=True), s=9, color="0.3", alpha=0.25, linewidths=0, zorder=0,
                 label=f"D of each feature that is kept, seed {seeds[0]['seed']}")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 4, 5, 10, 20])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_ylim(0, 1.15)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.86))
    return figure


def diagrams(phases):
    """What was trained beside what the closed form says, for each number of features."""
    figure = Figure(figsize=(8.2, 1 + 3.5 * len(phases)), layout="constrained")
    shares = " and ".join(f"{found['agree']:.0%}" for found in phases.values())
    figure.suptitle("Training does with the last feature what a closed form says, in\n"
                    f"{shares} of the cells that are not on a boundary", x=0.01, ha="left")
    grid = figure.subplots(len(phases), 2, squeeze=False)
    for row, (name, found) in zip(grid, phases.items(), strict=True):
        n, m = name.split(",")
        for axes, key, label in zip(row, ("found", "expected"), ("trained", "closed form"),
                                    strict=True):
            bare_axes(axes, f"{label}: {n} features, {m} dimension" + "s" * (m != "1"),
                      "importance of the last, others 1", "density")
            axes.pcolormesh(found["importance"], found["density"], found[key], shading="nearest",
                            cmap=ListedColormap(PHASE_COLOURS), vmin=-0.5, vmax=2.5)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
            axes.set_yticks([0.1, 0.3, 1], ["0.1", "0.3", "1"])
            axes.minorticks_off()
    handles = [grid[0, 0].scatter([], [], marker="s", s=70, color=colour, label=label)
               for colour, label in zip(PHASE_COLOURS, ARRANGEMENTS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False,
                  title="the last feature is", title_fontsize=9)
    return figure
