"""Report the superposition experiment: its claims, its summary and its figures.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: plotting.py, experiments/superposition/measure.py
Next: experiments/feature_superposition_toy_model.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import functools
import math
import statistics
from dataclasses import dataclass, replace

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from experiments.common import claim
from experiments.superposition.measure import ARRANGEMENTS
from plotting import COLOURS, bare_axes, draw_lines

PHASE_COLOURS = ("0.88", COLOURS[0], COLOURS[4])  # in the order of ARRANGEMENTS


@dataclass(frozen=True)
class SeedMeasures:
    """The measures of all seeds, from which claims are made.

    found: nested dicts, one for each seed; a path of keys leads to a value. judged: False leaves
    every claim open.
    """

    found: list
    judged: bool = True

    def values(self, *path):
        """The value at the end of the path, for each seed."""
        return [functools.reduce(dict.__getitem__, path, each) for each in self.found]

    def mean(self, *path):
        """The mean of these values, as a text."""
        values = self.values(*path)
        return f"{sum(values) / len(values):.3g}"

    def claim(self, text, path, beside, **threshold):
        """A Claim that each seed's value lies above or below a number.

        beside: a text after the threshold, such as the same measure of an untrained model.
        threshold: above or below, as in `common.claim`.
        """
        line = claim(text, self.values(*path), judged=self.judged, **threshold)
        return replace(line, control=f"{line.control}; {beside}")


def claims_of_toys(found, *, judged=True):
    """[Claim] from the measures of each seed."""
    measures = SeedMeasures(found, judged)
    return [*polytope_claims(measures), *plateau_claims(measures), *phase_claims(measures),
            *pair_claims(measures)]


def polytope_claims(measures):
    """Five features in the plane."""
    study = "polytopes"
    mean = functools.partial(measures.mean, study)

    return [
        measures.claim(
            "5 features in 2 dimensions, density 1: D of the two most important (the smaller)",
            (study, "dense"),
            f"the others at most {mean('dense_others')}, untrained {mean('untrained_dense')}",
            above=0.95),
        measures.claim(
            "density 0.26, four features: largest distance of D from 1/2",
            (study, "pairs"), f"untrained {mean('untrained_pairs')}", below=0.03),
        measures.claim(
            "… in antipodal pairs: largest cosine of a feature with its opposite",
            (study, "antipodes"), "two bases 45 degrees apart have D = 1/2 too", below=-0.9),
        measures.claim(
            "density 0.05, five features share equally: largest distance of D from 2/5",
            (study, "pentagon"),
            f"untrained {mean('untrained_pentagon')}, linear {mean('linear_pentagon')}",
            below=0.03),
        measures.claim(
            "… as a pentagon: largest distance of a neighbour's angle from 72 degrees",
            (study, "gaps"), f"untrained {mean('untrained_gaps')}", below=5.0),
        measures.claim(
            "no sharing without the ReLU: largest sum of |W_i|^2 at any density",
            (study, "linear_kept"), f"with ReLU {mean('kept')} at density 0.05", below=2.05),
    ]


def plateau_claims(measures):
    """Many features in twenty dimensions."""
    study = "geometry"
    mean = functools.partial(measures.mean, study)

    return [
        measures.claim(
            "200 features in 20 dimensions, density 1: distance of D* = m / |W|^2 from 1",
            (study, "dense"), f"untrained {mean('untrained_dense')}", below=0.03),
        measures.claim(
            "plateau at 1 / density 2.5 to 3.6: largest distance of D* from 1/2",
            (study, "plateau"), f"linear {mean('linear')}", below=0.03),
        measures.claim(
            "… it is flat: slope of ln D* over ln density",
            (study, "slope"), f"beyond the plateau {mean('slope_after')}", below=0.2),
        measures.claim(
            "… it consists of pairs: share of kept features with D of 1/2 ± 0.03 and an antipode",
            (study, "halves"), f"untrained {mean('untrained_halves')}", above=0.9),
    ]


def phase_claims(measures):
    """One feature too many."""
    claims = []
    for name in measures.found[0]["phases"]:
        mean = functools.partial(measures.mean, "phases", name)
        claims.append(measures.claim(
            f"phases of ({name}): share of cells away from boundaries that agree with the closed "
            "form", ("phases", name, "agree"),
            f"{mean('away')} of cells are away; of all cells {mean('agree_all')} agree; densities "
            f"shuffled {mean('density_shuffled')}, importances shuffled "
            f"{mean('importance_shuffled')}; one start {mean('single')}",
            above=0.9))
    return claims


def pair_claims(measures):
    """Features that come in pairs."""
    claims = []
    for meeting, angle in (("never", "antipodal"), ("always", "orthogonal")):
        by_chance = measures.mean("pairs", "by chance", angle)
        claims.append(measures.claim(
            f"pairs that {meeting} meet: share that is {angle}", ("pairs", meeting, angle),
            f"pairs that meet by chance {by_chance}", above=0.95))
    return claims


def summarize_toys(found):
    """Three sentences that say what was found, from the measures of each seed."""
    plane = found[0]["polytopes"]
    kept = count_kept(plane)
    star = statistics.fmean(value for each in found for value, on_plateau in zip(
        each["geometry"]["star"], each["geometry"]["on"], strict=True) if on_plateau)
    agree = min(phases["agree"] for each in found for phases in each["phases"].values())
    return (
        f"In two dimensions the first seed's model keeps {kept[0]} of 5 features if they are "
        f"always present, and {kept[-1]} if each is present in one example of twenty "
        "(polytopes.png). "
        f"With 200 features in 20 dimensions, each feature that is kept has {star:.2f} of a "
        "dimension on the plateau (plateau.png). "
        "Where a closed form clearly predicts how one feature too many is stored, training agrees "
        f"in at least {agree:.0%} of the cells (phases.png)."
    )


def figures_of_toys(found):
    """{name: Figure} from the measures of each seed; planes and phases are the first one's."""
    return {"polytopes": polytope_figure(found[0]["polytopes"]),
            "plateau": plateau_figure(found),
            "phases": phase_figure(found[0]["phases"])}


def count_kept(plane):
    """The number of features that are kept (longer than 1/2) at each density: a list of int."""
    return [sum(math.hypot(*column) > 0.5 for column in zip(*W, strict=True)) for W in plane["W"]]


def polytope_figure(plane):
    """The Figure of five directions in the plane, with a panel for each density."""
    kept = count_kept(plane)
    n_columns = 5
    n_rows = -(-len(kept) // n_columns)
    figure = Figure(figsize=(9.5, 0.9 + 2.1 * n_rows), layout="constrained")
    figure.suptitle(f"Two dimensions keep {kept[0]} features that are always there, and "
                    f"{kept[-1]} that are rare", x=0.01, ha="left", fontsize=12)

    longest = max(math.hypot(*column) for W in plane["W"] for column in zip(*W, strict=True))
    edge = 1.1 * longest
    for axes, W, density in zip(figure.subplots(n_rows, n_columns).flat, plane["W"],
                                plane["density"], strict=True):
        for i, (x, y) in reversed(list(enumerate(zip(*W, strict=True)))):
            axes.plot([0, x], [0, y], color=COLOURS[i], linewidth=2)
            axes.plot(x, y, "o", color=COLOURS[i], markersize=5, label=f"{0.9**i:.2f}")
        axes.set_title(f"active {100 * density:.0f} % of the time", fontsize=9)
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("0.85")

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title_fontsize=9, fontsize=9, frameon=False,
                  loc="outside lower center", ncols=5,
                  title="a line from the origin is a feature's direction; its importance in the "
                        "loss:")
    return figure


def plateau_figure(found):
    """The Figure of D* of each seed, and D of every feature of the first, over 1 / density."""
    first = found[0]["geometry"]
    on_plateau = [(rarity, star) for rarity, star, inside in zip(
        first["rarity"], first["star"], first["on"], strict=True) if inside]
    mean_star = sum(star for _, star in on_plateau) / len(on_plateau)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = bare_axes(
        figure.subplots(),
        f"Features of density 1/{on_plateau[0][0]:.1f} to 1/{on_plateau[-1][0]:.1f} get "
        f"{mean_star:.2f} of a dimension each",
        "1 / density (log scale)", "dimensions per feature")

    # a line a seed, a dot a feature
    lines = {f"D* = m / |W|², seed {each['seed']}":
             (each["geometry"]["rarity"], each["geometry"]["star"]) for each in found}
    draw_lines(axes, lines, {"|W|² = m": 1.0, "|W|² = 2 m": 0.5})
    dots = [(rarity, D)
            for rarity, row, lengths in zip(first["rarity"], first["D"], first["length"],
                                            strict=True)
            for D, length in zip(row, lengths, strict=True) if length > 0.5]
    axes.scatter(*zip(*dots, strict=True), s=9, color="0.3", alpha=0.25, linewidths=0, zorder=0,
                 label=f"D of each feature that is kept, seed {found[0]['seed']}")

    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 4, 5, 10, 20])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_ylim(0, 1.15)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.86))
    return figure


def phase_figure(phases):
    """The Figure of trained phases beside those of the closed form, for each number of features."""
    figure = Figure(figsize=(8.2, 1 + 3.5 * len(phases)), layout="constrained")
    shares = " and ".join(f"{each['agree']:.0%}" for each in phases.values())
    figure.suptitle("Training does with the last feature what a closed form says, in\n"
                    f"{shares} of the cells that are not on a boundary", x=0.01, ha="left")

    grid = figure.subplots(len(phases), 2, squeeze=False)
    for row, (name, each) in zip(grid, phases.items(), strict=True):
        n, m = name.split(",")
        dimensions = "1 dimension" if m == "1" else f"{m} dimensions"
        for axes, key, label in zip(row, ("found", "expected"), ("trained", "closed form"),
                                    strict=True):
            bare_axes(axes, f"{label}: {n} features, {dimensions}",
                      "importance of the last, others 1", "density")
            axes.pcolormesh(each["importance"], each["density"], each[key], shading="nearest",
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
