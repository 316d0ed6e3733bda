"""Report the circuit scoreboard: its claims, its summary, the board as text, and its figure.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: plotting.py, experiments/scoreboard/measure.py
Next: experiments/circuit_scoreboard.py
Source: Mueller et al. 2025 (CPR, CMD); Méloux et al. 2025 (Jaccard 0.67 in GPT-2 small)
"""

import itertools
import math
from statistics import fmean, median

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.common import claim
from experiments.scoreboard.measure import METHODS
from metrics import permutation_pvalue, spearman
from plotting import COLOURS, bare_axes

SAME = 1e-9  # two AUROCs that differ by less are equal
BEATS_CHANCE = ("exact", "EAP-IG gauss", "ACDC")  # claimed for trained models, decided beforehand
STABLE = ("exact", "EAP-IG gauss")
PUBLISHED_JACCARD = 0.67  # the threshold of stability, decided beforehand
FURTHEST = 3.5  # standard errors; the furthest of 18 means exceeds it in less than 1 % of runs


def scoreboard_claims(rows, judged=True):
    """[Claim] about the rows that `score_model` returned. judged: whether claims about trained
    models are judged; those about wired circuits always are."""
    trained = [row for row in rows if row["wired"] is None]
    wired = [row for row in rows if row["wired"] is not None]
    return [*wired_claims(wired), *trained_claims(trained, judged), *cost_claims(rows)]


def of_method(rows, name):
    """The rows of one method."""
    return [row for row in rows if row["method"] == name]


# Wired circuits, whose truth is known


def wired_claims(rows):
    """Each AUROC is the one that follows from the wiring; chance agrees with its closed form."""
    chance = fmean(row["auroc"] for row in of_method(rows, "random"))
    claims = []
    for name in METHODS:
        own = of_method(rows, name)
        holds = all(abs(row["auroc"] - row["wired"]) < SAME for row in own)
        least = min(row["wired"] for row in own)
        claims.append(claim(f"{name}: AUROC on wired circuits", [row["auroc"] for row in own],
                            holds=holds, control=f"wired: {least:.2g} to 1; random {chance:.2f}"))

    series = [row for row in of_method(rows, "random") if row["expected"]]
    expected = fmean(row["expected"][0] for row in series)
    claims.append(claim(
        "random: CMD for edges in series, distance from its closed form in standard errors",
        [abs(standard_errors(row)) for row in series], below=FURTHEST,
        control=f"below {FURTHEST:g}; CMD {fmean(row['cmd'] for row in series):.3f}, closed form "
                f"{expected:.3f}"))
    return claims


def standard_errors(row):
    """The distance of the mean CMD of random rankings from its closed form, in standard errors."""
    mean, spread = row["expected"]
    return (row["cmd"] - mean) / (spread / math.sqrt(len(row["cmds"])))


# Trained models, whose truth is not known


def trained_claims(rows, judged):
    """Rankings beat random ones, and are stable when prompts are drawn again."""
    random = {(row["model"], row["seed"]): row for row in of_method(rows, "random")}
    claims = []
    for name in METHODS:
        own = of_method(rows, name)
        p = [chance_does_as_well(row, random[row["model"], row["seed"]]) for row in own]
        chance = fmean(row["cmd"] for row in random.values())
        control = f"CMD {fmean(row['cmd'] for row in own):.3f}, random {chance:.3f}"
        claims.append(claim(f"{name}: p of its CMD among random rankings, median of trained models",
                            p, p=median(p) if name in BEATS_CHANCE else None, median=True,
                            judged=judged, control=control))
    for name in METHODS:
        own = of_method(rows, name)
        chance = fmean(row["chance"] for row in own)
        how = {}
        if name in STABLE:
            how = {"above": PUBLISHED_JACCARD,
                   "holds": all(row["stability"] > row["chance"] for row in own)}
        claims.append(claim(f"{name}: Jaccard over draws of prompts, median of trained models",
                            [row["stability"] for row in own], median=True, judged=judged,
                            reported=f"{PUBLISHED_JACCARD:g}", control=f"random {chance:.2f}",
                            **how))
    agreements = order_agreements(rows)
    if agreements:
        claims.append(claim("order of the methods by CMD: Spearman of two seeds, trained models",
                            agreements, control="0 for unrelated orders"))

    return claims


def chance_does_as_well(row, random):
    """The p-value of a row's CMD among those of random rankings."""
    return permutation_pvalue(-row["cmd"], -torch.tensor(random["cmds"])).item()


def order_agreements(rows):
    """The Spearman of the methods' CMDs for each model and pair of seeds, without NaNs."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["method"] in METHODS]
        by_seed = {}
        for row in own:
            by_seed.setdefault(row["seed"], []).append(row["cmd"])
        for one, other in itertools.combinations(by_seed.values(), 2):
            found.append(spearman(torch.tensor(one), torch.tensor(other)).item())
    return [value for value in found if not math.isnan(value)]


def cost_claims(rows):
    """The time of exact effects compared with a gradient's, and the time of each model."""
    seconds = {(row["model"], row["seed"], row["method"]): row["seconds"] for row in rows}
    ratios = [seconds[model, seed, "exact"] / seconds[model, seed, "EAP"]
              for model, seed, method in seconds if method == "EAP"]
    return [claim("time of exact effects / time of EAP", ratios, median=True),
            claim("seconds to score a model by all methods",
                  [row["took"] for row in of_method(rows, "random")], below=120)]


# The board


def board_lines(rows):
    """The board as lines of text: means over models and seeds for each method, on wired and on
    trained models."""
    lines = [f"{'':14}{'wired':^35} {'trained':^28}",
             f"{'method':14}{'CPR':>7}{'CMD':>7}{'AUROC':>7}{'Jaccard':>8}{'s':>6} "
             f"{'CPR':>7}{'CMD':>7}{'Jaccard':>8}{'s':>6}"]
    for name in (*METHODS, "random"):
        cells = ""
        for is_wired in (True, False):
            own = [row for row in of_method(rows, name) if (row["wired"] is not None) == is_wired]
            mean = {key: fmean(row[key] for row in own)
                    for key in ("cpr", "cmd", "stability", "seconds")}
            auroc = f"{fmean(row['auroc'] for row in own):7.3f}" if is_wired else " "
            cells += (f"{mean['cpr']:7.3f}{mean['cmd']:7.3f}{auroc}{mean['stability']:8.2f}"
                      f"{mean['seconds']:6.2f}")
        lines.append(f"{name:14}{cells}")
    return lines


def describe_findings(rows):
    """Three sentences that say what was found."""
    cells = [row for row in rows if row["wired"] is not None and row["method"] != "random"]
    as_wired = sum(abs(row["auroc"] - row["wired"]) < SAME for row in cells)
    trained = [row for row in rows if row["wired"] is None]
    cmd = {name: fmean(row["cmd"] for row in of_method(trained, name))
           for name in (*METHODS, "random")}
    best = min(METHODS, key=cmd.get)
    exact, gradient = (fmean(row["seconds"] for row in of_method(trained, name))
                       for name in ("exact", "EAP"))
    name = "exact effects" if best == "exact" else best
    return (f"{len(METHODS)} methods ranked the edges of {len({row['model'] for row in rows})} "
            f"models. On wired circuits, {as_wired} of {len(cells)} AUROCs equal the value that "
            f"follows from the wiring. On trained models, circuits by {name} stay closest to the "
            f"model over all sizes, with a CMD of {cmd[best]:.3f} (EAP {cmd['EAP']:.3f}, random "
            f"{cmd['random']:.3f}); exact effects take {exact / gradient:.0f} times as long as "
            "EAP.")


def scoreboard_figure(rows):
    """The Figure of CMD by method and model, against the band of random rankings, and of the
    Jaccard over draws of prompts."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    trained = [row for row in rows if row["wired"] is None]
    best, chance = (fmean(row["cmd"] for row in of_method(trained, name))
                    for name in ("EAP-IG gauss", "random"))
    bare_axes(upper, f"Circuits of trained models are {best:.2f} from the model if EAP-IG ranks "
              f"the edges, {chance:.2f} in a random order", "",
              "distance from the model,\nmean over circuit sizes (CMD)")
    kept, kept_wired = (fmean(row["stability"] for row in of_method(some, "EAP-IG gauss"))
                        for some in (trained, [row for row in rows if row["wired"] is not None]))
    bare_axes(lower, "EAP-IG's best edges for two draws of prompts overlap by "
              f"{kept:.2f} in trained models, by {kept_wired:.2f} in wired ones", "model",
              "overlap of the best edges\nfor two draws (Jaccard)")

    for x, model in enumerate(models):
        random = [row for row in of_method(rows, "random") if row["model"] == model]
        low, high = np.quantile(np.concatenate([row["cmds"] for row in random]), [0.05, 0.95])
        upper.fill_between([x - 0.4, x + 0.4], low, high, color="0.88",
                           label="random rankings, 5 to 95 %" if x == 0 else None)
        level = fmean(row["chance"] for row in random)
        lower.plot([x - 0.4, x + 0.4], [level, level], color="0.5",
                   label="random sets of edges" if x == 0 else None)

    # a dot for each method and seed
    for i, name in enumerate(METHODS):
        own = of_method(rows, name)
        x = [models.index(row["model"]) + 0.13 * (i - 2.5) for row in own]
        colour = COLOURS[i % len(COLOURS)]
        upper.plot(x, [row["cmd"] for row in own], "o", color=colour, markersize=4, label=name)
        lower.plot(x, [row["stability"] for row in own], "o", color=colour, markersize=4)
    lower.set_xticks(range(len(models)), models, rotation=30, ha="right", fontsize=8)
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, 1.05)
    above, below = upper.get_legend_handles_labels(), lower.get_legend_handles_labels()
    figure.legend(above[0] + below[0], above[1] + below[1], frameon=False, fontsize=8, ncols=4,
                  loc="outside lower center")
    return figure
