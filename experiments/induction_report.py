"""What the trained models of the induction experiment show: its claims, and its figure.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: experiments/induction_proof.py; after: experiments/induction_head_detection.py
Source: Elhage et al. 2021; Olsson et al. 2022
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import textwrap
from statistics import fmean

from matplotlib.figure import Figure

from experiments.common import over_seeds
from experiments.induction_model import WORDS
from experiments.induction_proof import TEXTS
from plotting import COLOURS, bare_axes

UNIFORM = math.log(len(WORDS))
SHORT = "segments of 2 to 5"


def score_of(row, kind, head):
    """The score of a head, (layer, head), in a row of a history."""
    return row[kind][head[0]][head[1]]


def best_score(row, kind):
    """The highest score of any head."""
    return max(max(heads) for heads in row[kind])


def claims_of(seeds, tested=True):
    """The claims on the trained models; without `tested` none is held against its mark."""
    def claim(text, value, holds=None, **more):
        values = [math.nan if number is None else number for number in map(value, seeds)]
        return over_seeds(text, values, holds if tested else None, **more)

    def mean(value):
        return f"{fmean(map(value, seeds)):.2g}"

    return (formed(claim, mean) + together(claim) + composed(claim, mean)
            + removed(claim, mean) + on_the_way(claim, mean) + elsewhere(claim)
            + failing(claim, mean))


def formed(claim, mean):
    """That it is there: losses and scores."""
    def now(found):
        return found["measured"]

    def untrained(kind):
        return mean(lambda found: best_score(found["history"][0], kind))

    return [
        claim("loss on repeats below .1 (nats)", lambda found: now(found)["repeats"],
              lambda loss: loss < 0.1, mark=0.1,
              control=f"before training {mean(lambda found: found['history'][0]['repeats'])}"),
        claim("loss on first occurrences (nats)", lambda found: now(found)["first"],
              control=f"uniform guess {UNIFORM:.3g}"),
        claim("induction score above .9",
              lambda found: score_of(now(found), "induction", found["heads"]["induction"]),
              lambda score: score > 0.9, mark=0.9,
              control=f"untrained, best head {untrained('induction')}"),
        claim("the same head, scored one key off", lambda found: found["shifted"],
              control="at most what the score leaves of 1"),
        claim("previous-token score above .85",
              lambda found: score_of(now(found), "previous-token", found["heads"]["previous"]),
              lambda score: score > 0.85, mark=0.85,
              control=f"untrained, best head {untrained('previous-token')}"),
    ]


def together(claim):
    """That it comes at once."""
    def share(found):
        phase, last = found["phase"], found["history"][-1]["step"]
        if None in (phase["loss at 90 %"], phase["loss at 10 %"]):
            return math.nan
        return (phase["loss at 10 %"] - phase["loss at 90 %"]) / last

    def apart(found):
        phase = found["phase"]
        if None in (phase["induction"], phase["loss at 50 %"]):
            return math.nan
        return phase["induction"] - phase["loss at 50 %"]

    return [
        claim("loss on repeats falls from 90 % to 10 % in this share of the steps", share,
              lambda value: value < 0.2, reported="a phase change", control="at most .2", mark=0.2),
        claim("steps from half the loss to an induction score of .5", apart,
              lambda value: abs(value) <= 50, control="at most 50 either way", mark=50),
        claim("in-context score (nats, late less early)",
              lambda found: found["measured"]["in_context"], lambda score: score < -3,
              reported="below 0", control="before training 0; at most -3", mark=-3),
    ]


def strongest_other(found):
    """The K-composition of the layer's other heads with the induction head, the largest z."""
    return max(found["composition"]["other K"], default=math.nan)


def composed(claim, mean):
    """That the weights of the two heads fit."""
    def lead(found):
        z = found["composition"]
        return z["K"] - max(z["Q"], z["V"], *z["other K"])

    return [
        claim("previous-token to induction head, K-composition (z of 300 random draws)",
              lambda found: found["composition"]["K"], lambda z: z > 5, mark=5,
              reported="stands out", control="at least 5"),
        claim("by how much it leads Q, V and the layer's other head into K (z)", lead,
              lambda z: z > 5, mark=5,
              control=f"Q {mean(lambda found: found['composition']['Q'])}, "
                      f"V {mean(lambda found: found['composition']['V'])}, other head "
                      f"{mean(strongest_other)}"),
        claim("the other head into the induction head's values, V-composition (z)",
              lambda found: max(found["composition"]["other V"], default=math.nan),
              control=f"without that head the loss rises by {mean(most_without_others)}"),
    ]


def rise(found, name):
    """The rise of the loss on repeats without a part."""
    return found["ablation"][name]["repeats"] - found["ablation"]["nothing"]["repeats"]


def most_without_others(found):
    """The largest rise without any other head of the first layer."""
    return max((rise(found, name) for name in found["ablation"] if name.startswith("other head")),
               default=math.nan)


def removed(claim, mean):
    """What is lost without them."""
    other = f"without the layer's other head {mean(most_without_others)}"
    return [
        claim("loss on repeats rises without the previous-token head (nats)",
              lambda found: rise(found, "previous-token head"), lambda nats: nats > 3, mark=3,
              control=other),
        claim("induction score without the previous-token head",
              lambda found: found["ablation"]["previous-token head"]["induction"],
              lambda score: score < 0.1, mark=0.1,
              control=f"as it is {mean(lambda f: f['ablation']['nothing']['induction'])}"),
        claim("loss rises without the other head of that layer (nats)", most_without_others,
              lambda nats: nats < 0.1, mark=0.1, control="at most .1"),
        claim("loss rises without all heads of an induction score above .5 (nats)",
              lambda found: rise(found, "all induction heads"), lambda nats: nats > 3, mark=3,
              control=f"without the best one alone {mean(lambda f: rise(f, 'induction head'))}"),
    ]


def share_of_path(found, way):
    """What a way carries of all that the previous-token head does to the loss."""
    return found["paths"][way] / found["paths"]["previous-token head by all ways"]


def on_the_way(claim, mean):
    """Which path carries it."""
    def worst_control(found):
        ways = [way for way in found["paths"] if way[-1] in "QV" or way.startswith("other head")]
        return max(abs(share_of_path(found, way)) for way in ways)

    return [
        claim("share of the previous-token head's effect by way of the induction heads' keys",
              lambda found: share_of_path(found, "previous-token head to K"),
              lambda share: share > 0.8, mark=0.8,
              control=f"by queries or values, or another head's to keys: {mean(worst_control)}"),
        claim("the largest of those controls", worst_control, lambda share: share < 0.1, mark=0.1,
              control="at most .1"),
    ]


def elsewhere(claim):
    """That it is no table of places or pairs."""
    def of(text):
        return claim(f"loss on repeats, {text} (nats)",
                     lambda found: found["transfer"][text]["repeats"], lambda loss: loss < 0.2,
                     mark=0.2, control="at most .2")

    def lowest(found):
        return min(found["transfer"][text]["induction"] for text in unseen)

    unseen = list(TEXTS)[1:]
    return [*map(of, unseen),
            claim("lowest induction score on these", lowest, lambda score: score > 0.9, mark=0.9,
                  control="at least .9")]


def failing(claim, mean):
    """What fails as it must: one layer, and texts that can be told by a distance."""
    return [
        claim("one layer, same training: loss on repeats (nats)",
              lambda found: found["one_layer"][-1]["repeats"], lambda loss: loss > 2, mark=2,
              reported="no induction", control="at least 2"),
        claim("one layer: best induction score",
              lambda found: best_score(found["one_layer"][-1], "induction"),
              lambda score: score < 0.2, mark=0.2, control="at most .2"),
        claim("trained with circles: loss on repeats (nats)",
              lambda found: found["circles"][-1]["repeats"], lambda loss: loss < 1, mark=1,
              control="at most 1: a low loss"),
        claim("trained with circles: best induction score",
              lambda found: best_score(found["circles"][-1], "induction"),
              lambda score: score < 0.2, mark=0.2, control="at most .2: and no such head"),
        claim("trained with circles: loss on segments of 2 to 5 (nats)",
              lambda found: found["circles_transfer"][SHORT]["repeats"], lambda loss: loss > 1,
              mark=1, control=f"with the heads {mean(lambda f: f['transfer'][SHORT]['repeats'])}"),
    ]


# The figure


def figure_of(seeds):
    """Losses and scores over training, and what interventions do to the trained model."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (losses, scores), (context, ways) = figure.subplots(2, 2)
    draw_losses(losses, seeds)
    draw_scores(scores, seeds)
    draw_lines_of(context, seeds, {"": lambda found, row: row["in_context"]})
    end = fmean(found["history"][-1]["in_context"] for found in seeds)
    bare_axes(context, f"Late tokens cost {-end:.1f} nats less than early ones in the end", "step",
              "in-context score: late less early (nats)")
    draw_ways(ways, seeds)
    began, ended = when(seeds, "loss at 90 %", min), when(seeds, "loss at 10 %", max)
    for axes in (losses, scores, context):
        if began is not None and ended is not None:
            axes.axvspan(began, ended, color="0.93", zorder=0)
    return figure


def when(seeds, event, which):
    """The first (min) or last (max) step of an event over the seeds; None where one lacks it."""
    steps = [found["phase"][event] for found in seeds]
    return None if None in steps else which(steps)


def draw_lines_of(axes, seeds, values, history="history", **style):
    """A line of each seed for each {name: value(found, row)}, over a history's steps."""
    first = len(axes.lines)
    for colour, (name, value) in zip(COLOURS[first // len(seeds):], values.items(), strict=False):
        for number, found in enumerate(seeds):
            rows = found[history]
            axes.plot([row["step"] for row in rows], [value(found, row) for row in rows],
                      color=colour, linewidth=1, label=None if number else name, **style)


def draw_losses(axes, seeds):
    """The losses of the model, and of the two that have no induction heads."""
    def repeats(found, row):
        return row["repeats"]

    draw_lines_of(axes, seeds, {"on repeats": repeats,
                                "on first occurrences": lambda found, row: row["first"]})
    draw_lines_of(axes, seeds, {"on repeats, one layer": repeats}, "one_layer", linestyle="--")
    draw_lines_of(axes, seeds, {"on repeats, trained with circles": repeats}, "circles",
                  linestyle="--")
    axes.axhline(UNIFORM, color="0.6", linewidth=0.8, linestyle=":", label="a uniform guess")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc=(0.45, 0.14))
    began, ended = when(seeds, "loss at 90 %", min), when(seeds, "loss at 10 %", max)
    title = ("The loss on repeats does not fall to 10 % with each seed" if None in (began, ended)
             else f"The loss on repeats falls from 90 % to 10 % in steps {began} to {ended}")
    bare_axes(axes, title, "step", "loss (nats/token)")


def draw_scores(axes, seeds):
    """The scores of the two heads, and the best of those that have no induction heads."""
    def best(found, row):
        return best_score(row, "induction")

    def of_part(kind, part):
        return lambda found, row: score_of(row, kind, found["heads"][part])

    draw_lines_of(axes, seeds, {"induction head": of_part("induction", "induction"),
                                "previous-token head": of_part("previous-token", "previous")})
    draw_lines_of(axes, seeds, {"best induction score, one layer": best}, "one_layer",
                  linestyle="--")
    draw_lines_of(axes, seeds, {"best induction score, trained with circles": best}, "circles",
                  linestyle="--")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc=(0.4, 0.4))
    by = ["not with each seed" if step is None else f"by step {step}"
          for step in (when(seeds, kind, max) for kind in ("induction", "previous-token"))]
    bare_axes(axes, f"Induction passes .5 {by[0]},\nthe previous-token score {by[1]}",
              "step", "score (share of attention)")


def draw_ways(axes, seeds):
    """A row for each intervention, a dot for each seed."""
    rows = {"previous-token head removed": lambda found: rise(found, "previous-token head"),
            "other head of its layer removed": most_without_others,
            "best induction head removed": lambda found: rise(found, "induction head"),
            "all induction heads removed": lambda found: rise(found, "all induction heads")}
    rows |= {f"previous-token head of another text, in the {name} alone":
             lambda found, end=end: found["paths"][f"previous-token head to {end}"]
             for end, name in (("K", "keys"), ("Q", "queries"), ("V", "values"))}
    for y, value in enumerate(rows.values()):
        axes.plot([value(found) for found in seeds], [y] * len(seeds), "o", color=COLOURS[0],
                  alpha=0.6)
    carried = fmean(share_of_path(found, "previous-token head to K") for found in seeds)
    bare_axes(axes, f"{100 * carried:.0f} % of the previous-token head's effect is in the keys",
              "rise of the loss on repeats (nats/token)", "")
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 26) for name in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.2", linewidth=0.8)
