"""Report the training dynamics: its claims, its summary and its figures.

A run is what `measure_training` returns. Runs are {name of the recipe: [the run of each seed]}:
"characters", "words" and, as a control, "no layers".

Thresholds were decided on paper after one training with seed 0 of a larger model of characters, and
before any of the models here was trained, except where a comment says otherwise. They are judged
with seeds 10 to 12.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: plotting.py, experiments/dynamics/measure.py
Next: experiments/dynamics/page.py
Source: Olsson et al. 2022 (heads and losses over training); Chang & Bergen 2022 (n-grams first)
"""

import itertools
import math
from statistics import fmean

from matplotlib.figure import Figure

from experiments.common import claim
from experiments.grokking.measure import first_step
from plotting import COLOURS, PlainFigure, bare_axes, show_spaces

ABILITIES = ("copying", "indirect object")  # in the order in which they should come
N_SHOWN = 6  # tokens of a comparison that got better, and as many that got worse
LOOKING_BACK = ("duplicate", *ABILITIES, "recall")  # what three words can't tell

# What the claims are about


def distances(run, table):
    """The distance to a table at each kept step, in nats per token: a list."""
    return [state["distance"][table] for state in run["states"]]


def dip(run, table):
    """Where a model is nearest to a table: a dict.

    step: the kept step; value: the distance there, in nats. before, after: the distance at the
    first and at the last step, divided by it. All three are 1 for a distance that never changes.
    """
    values = distances(run, table)
    nearest = min(values)
    return {"step": run["steps"][values.index(nearest)], "value": nearest,
            "before": values[0] / nearest, "after": values[-1] / nearest}


def lead(run):
    """At the step where the model is nearest to bigrams, its distance to the nearest other table
    (uniform, unigrams, trigrams) divided by that to bigrams."""
    number = run["steps"].index(dip(run, "bigrams")["step"])
    distance = run["states"][number]["distance"]
    return min(distance[name] for name in ("uniform", "unigrams", "trigrams")) / distance["bigrams"]


def ability_step(run, category):
    """The first kept step at which words of a category are less than half as far above their floor
    as trigrams put them; infinity if there is none."""
    half = run["trigrams_above"][category] / 2
    return first_step(run["steps"], run["states"], lambda state: state["above"][category] < half)


def best_scores(run, kind="previous token"):
    """The highest score of any head at each kept step, a list."""
    return [max(state["heads"][kind]) for state in run["states"]]


def half_step(steps, values):
    """The first step at which a value reaches half of the last one."""
    return first_step(steps, values, lambda value: value >= values[-1] / 2)


def watcher(run):
    """The number of the head that looks at the token before most, at the last step."""
    scores = run["states"][-1]["heads"]["previous token"]
    return scores.index(max(scores))


def watcher_steps(run):
    """(step, step) at which the watcher's score, and its effect, reach half of the last value."""
    head = watcher(run)
    return tuple(half_step(run["steps"], [state["heads"][name][head] for state in run["states"]])
                 for name in ("previous token", "effect"))


# Claims


def claims_of_dynamics(runs, judged=True):
    """[Claim] about all runs."""
    claims = []
    for name in ("characters", "words"):
        claims += table_claims(name, runs[name], runs["no layers"], judged)
    return [*claims, *head_claims(runs, judged), *ability_claims(runs["words"], judged)]


def table_claims(name, runs, no_layers, judged):
    """[Claim]: the model comes near to the table of bigrams, and leaves it again."""
    dips = {table: [dip(run, table) for run in runs] for table in runs[0]["states"][0]["distance"]}
    nearest = {table: [each["step"] for each in some] for table, some in dips.items()}
    bigrams = dips["bigrams"]
    renamed = max(each["before"] for each in dips["renamed bigrams"])

    claims = [
        claim(f"{name}: step at which the model is nearest to bigrams", nearest["bigrams"],
              control=f"bigrams of shuffled text: step {list_steps(nearest['shuffled bigrams'])}"),
        claim("… its distance then, KL(table ‖ model) in nats per token",
              [each["value"] for each in bigrams]),
        claim("… distance before training / then", [each["before"] for each in bigrams], above=3,
              judged=judged, control=f"above 3; bigrams of a renamed text: {renamed:.2f} at most"),
        claim("… distance at the end / then", [each["after"] for each in bigrams], above=1.5,
              judged=judged, control="above 1.5"),
        claim("… distance to the nearest other table / to bigrams, then",
              [lead(run) for run in runs], above=1.5, judged=judged),
        claim("… that step / the step nearest to unigrams",
              divide(nearest["bigrams"], nearest["unigrams"]), above=1, judged=judged),
        claim("… the step nearest to trigrams / that step",
              divide(nearest["trigrams"], nearest["bigrams"]), above=1, median=True,
              judged=judged),
    ]
    if name == "characters":
        claims.append(claim("without layers: distance to bigrams at the end / at the nearest",
                            [dip(run, "bigrams")["after"] for run in no_layers], below=1.1,
                            judged=judged, control="below 1.1: it never leaves them"))
    return claims


def list_steps(steps):
    """Some steps in words, such as "16, 20, 16"."""
    return ", ".join(f"{step:,}" for step in steps)


def divide(steps, by):
    """Some steps divided by others, a list; step 0 counts as 1."""
    return [max(one, 1) / max(other, 1) for one, other in zip(steps, by, strict=True)]


def head_claims(runs, judged):
    """[Claim]: heads look at the token before only after the model has been nearest to bigrams."""
    claims = []
    for name in ("characters", "words"):
        half = [half_step(run["steps"], best_scores(run)) for run in runs[name]]
        near = [dip(run, "bigrams")["step"] for run in runs[name]]
        scores, effects = zip(*map(watcher_steps, runs[name]), strict=True)
        untrained = fmean(best_scores(run)[0] for run in runs[name])
        claims += [
            claim(f"{name}: the best previous-token score at the end",
                  [best_scores(run)[-1] for run in runs[name]],
                  control=f"before training {untrained:.2f}"),
            claim("… step at which it reaches half of that / step nearest to bigrams",
                  divide(half, near), above=1, median=True, judged=judged),
            claim("… this head: step at which its score reaches half of its last value / the same "
                  "for the rise of the loss without it",
                  divide(scores, effects), control="1: together; below 1: the score comes first"),
        ]
    return claims


def ability_claims(runs, judged):
    """[Claim]: abilities that need more than three words come one after another."""
    claims = []
    steps = {name: [ability_step(run, name) for run in runs] for name in LOOKING_BACK}
    for name in LOOKING_BACK:
        claims.append(claim(f"words: step at which {name} costs less than half as much above the "
                            "floor as by trigrams", steps[name],
                            control=f"by trigrams {runs[0]['trigrams_above'][name]:.2f} nats"))
    for first, second in itertools.pairwise(ABILITIES):
        later = divide(steps[second], steps[first])
        claims.append(claim(f"… step of {second} / step of {first}", later, above=1,
                            holds=all(map(math.isfinite, later)), judged=judged))
    return claims


# The summary


def describe_findings(runs):
    """A few sentences that say what was found in the runs of the first seed."""
    run, words = runs["characters"][0], runs["words"][0]
    near = dip(run, "bigrams")
    far = near["after"] * near["value"]
    order = sorted(LOOKING_BACK, key=lambda name: ability_step(words, name))
    steps = ", ".join(f"{name} {at_step(ability_step(words, name))}" for name in order)
    return (f"The first model of characters is nearest to the table of bigrams "
            f"{at_step(near['step'])} ({near['value']:.2f} nats away), and {far:.2f} nats away at "
            f"the end. To unigrams it is nearest {at_step(dip(run, 'unigrams')['step'])}, to "
            f"trigrams {at_step(dip(run, 'trigrams')['step'])}. A model without layers stays with "
            f"bigrams. What needs more than three words comes later, on words: {steps} "
            "(training_dynamics.png, losses.png).")


def at_step(step):
    """A moment of a training in words: "at step 52", or "at no step"."""
    return f"at step {step:,}" if math.isfinite(step) else "at no step"


# Figures


def figures_of_dynamics(runs):
    """{name: Figure}: distances, abilities and heads over training, and losses by token and by
    position."""
    return {"training_dynamics": dynamics_figure(runs), "losses": losses_figure(runs)}


def dynamics_figure(runs):
    """The Figure of the distances to tables, and below them of heads and of abilities."""
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    (left, right), (heads, abilities) = figure.subplots(2, 2)
    draw_distances(left, "characters", runs["characters"], runs["no layers"])
    draw_distances(right, "words", runs["words"])
    draw_heads(heads, runs["characters"][0])
    draw_abilities(abilities, runs["words"])
    return figure


def over_steps(axes):
    """A logarithmic axis of steps on which step 0 has a place."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    ticks = [0, 1, 10, 100, 1000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def draw_distances(axes, name, runs, no_layers=None):
    """Draw the distance to each table over the steps, the first seed's with thick lines."""
    near = dip(runs[0], "bigrams")
    bare_axes(axes, f"{name}: nearest to bigrams {at_step(near['step'])}, {near['value']:.2f} nats "
              f"away;\nthen it leaves them: {near['after'] * near['value']:.2f} at the end",
              "step (log scale)", "KL(table ‖ model), nats per token")
    for table, colour in zip(("unigrams", "bigrams", "trigrams"), COLOURS, strict=False):
        for number, run in enumerate(runs):
            axes.plot(run["steps"], distances(run, table), color=colour,
                      label=table if number == 0 else None, linewidth=0.8 if number else 2)
    if no_layers is not None:
        axes.plot(no_layers[0]["steps"], distances(no_layers[0], "bigrams"), "--", color="0.4",
                  label="bigrams, no layers")
    axes.axvline(near["step"], color="0.8", linewidth=1, zorder=0)
    axes.set_ylim(0, 1.1 * distances(runs[0], "trigrams")[0])
    over_steps(axes)
    axes.legend(frameon=False, fontsize=9, loc="center left")


def draw_heads(axes, run):
    """Draw each head's previous-token score over the steps, and the effect of the best one."""
    near = dip(run, "bigrams")["step"]
    half = half_step(run["steps"], best_scores(run))
    head = watcher(run)
    bare_axes(axes, f"characters: heads look one back after the nearest step, {near:,};\nthe best "
              f"score is half of its last value {at_step(half)}", "step (log scale)",
              "share of attention to the token before")
    for number, label in enumerate(run["heads"]):
        scores = [state["heads"]["previous token"][number] for state in run["states"]]
        axes.plot(run["steps"], scores, color=COLOURS[0] if number == head else "0.75",
                  linewidth=2 if number == head else 0.8, zorder=2 if number == head else 1,
                  label=f"{label}, the best at the end" if number == head else None)
    effects = [state["heads"]["effect"][head] for state in run["states"]]
    axes.plot(run["steps"], effects, "--", color=COLOURS[1],
              label="rise of the loss without it (nats)")
    axes.axvline(near, color="0.8", linewidth=1, zorder=0)
    over_steps(axes)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_abilities(axes, runs):
    """Draw how far each kind of word that needs looking back lies above its floor."""
    order = sorted(LOOKING_BACK, key=lambda name: ability_step(runs[0], name))
    steps = [ability_step(runs[0], name) for name in order]
    bare_axes(axes, f"words: {order[0]} comes {at_step(steps[0])},\n{order[-1]} "
              f"{at_step(steps[-1])}", "step (log scale)", "nats above the floor")
    for name, colour in zip(order, COLOURS, strict=False):
        for number, run in enumerate(runs):
            axes.plot(run["steps"], [state["above"][name] for state in run["states"]],
                      color=colour, label=name if number == 0 else None,
                      linewidth=0.8 if number else 2)
    axes.set_ylim(0, 3)
    over_steps(axes)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def losses_figure(runs):
    """The Figure of the losses of single tokens over the steps, and of the loss by position."""
    figure = Figure(figsize=(11.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_quantiles(left, runs["characters"][0])
    draw_by_position(right, runs["words"][0])
    return figure


def draw_quantiles(axes, run):
    """Draw how the losses of single tokens are spread, over the steps."""
    *_, last = run["states"]
    low, *_, high = last["quantiles"]
    bare_axes(axes, f"characters: at the end the cheapest tenth costs at most {low:.2g} nats,\n"
              f"the dearest at least {high:.2g}", "step (log scale)", "loss of a token (nats)")
    quantiles = list(zip(*(state["quantiles"] for state in run["states"]), strict=True))
    axes.fill_between(run["steps"], quantiles[0], quantiles[-1], color=COLOURS[0], alpha=0.15,
                      label="the middle 80 % of tokens")
    axes.fill_between(run["steps"], quantiles[1], quantiles[-2], color=COLOURS[0], alpha=0.3,
                      label="the middle half")
    axes.plot(run["steps"], quantiles[2], color=COLOURS[0], label="the median")
    axes.plot(run["steps"], [state["loss"] for state in run["states"]], color=COLOURS[1],
              label="the mean")
    over_steps(axes)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def draw_by_position(axes, run):
    """Draw the mean loss at each position of the window: at the first step, at the one nearest to
    bigrams, and at the last."""
    near = run["steps"].index(dip(run, "bigrams")["step"])
    gains = [late_gain(run["states"][number]) for number in (near, -1)]
    bare_axes(axes, f"words: from early to late in the window, {-gains[1]:+.2f} nats at the end;\n"
              f"when the model is nearest to bigrams, {-gains[0]:+.2f}", "number of the word",
              "mean loss (nats)")
    for number, colour in ((0, "0.6"), (near, COLOURS[1]), (-1, COLOURS[0])):
        values = run["states"][number]["by_position"]
        axes.plot(range(2, len(values) + 2), values, color=colour,
                  label=f"step {run['steps'][number]:,}")
    axes.legend(frameon=False, fontsize=9)


def late_gain(state):
    """The mean loss of the third to the tenth token of a window minus that of its second half."""
    values = state["by_position"]
    return fmean(values[1:9]) - fmean(values[len(values) // 2 :])


# A comparison of two models


def changed(rows):
    """Those of some tokens or heads whose interval does not include 0."""
    return [row for row in rows if row["low"] > 0 or row["high"] < 0]


def shown_tokens(comparison):
    """The tokens that changed the mean loss most, a list: up to N_SHOWN better and worse ones."""
    rows = changed(comparison["tokens"])
    better = [row for row in rows if row["change"] < 0][:N_SHOWN]
    worse = [row for row in rows if row["change"] > 0][-N_SHOWN:]
    return [*better, *worse]


def claims_of_comparison(comparison):
    """[Claim], none of them judged: the two losses, the tokens and the heads that changed."""
    first, second = comparison["names"]
    before, after = comparison["losses"]
    tokens, heads = comparison["tokens"], comparison["heads"]
    claims = [
        claim(f"mean loss of {second} minus that of {first} (nats per token)", after - before,
              control=f"{after:.3f} and {before:.3f}"),
        claim("share of tokens that cost a nat less", comparison["share_better"],
              control=f"a nat more: {comparison['share_worse']:.2g}"),
        claim("tokens whose mean loss changed, of those that occur often", len(changed(tokens)),
              control=f"of {len(tokens)}; by chance {len(tokens) / 20:.2g}"),
    ]
    claims += [claim(f"“{show_spaces(row['token'])}”: change of its loss (nats)", row["change"],
                     interval=(row["low"], row["high"]),
                     control=f"{row['n']:,} times; {row['of_all']:+.3f} of the mean loss")
               for row in shown_tokens(comparison)]
    for row in heads:
        look = " to ".join(f"{score:.2f}" for score in row["scores"]["previous token"])
        claims.append(claim(f"{row['name']}: change of the rise of the loss without it",
                            row["change"], interval=(row["low"], row["high"]),
                            control=f"looks one back: {look}"))
    return claims


def describe_comparison(comparison):
    """A few sentences that say what changed."""
    first, second = comparison["names"]
    before, after = comparison["losses"]
    shown = shown_tokens(comparison)
    text = (f"From {first} to {second} the mean loss goes from {before:.3f} to {after:.3f} nats. "
            f"{comparison['share_better']:.0%} of the tokens cost a nat less, "
            f"{comparison['share_worse']:.0%} a nat more. ")
    if shown and shown[0]["change"] < 0:
        text += f"Most is gained on “{show_spaces(shown[0]['token'])}”. "
    if shown and shown[-1]["change"] > 0:
        text += f"Most is lost on “{show_spaces(shown[-1]['token'])}”. "
    if comparison["heads"]:
        row = comparison["heads"][0]
        text += (f"The head that changes most is {row['name']}: without it the loss rises by "
                 f"{row['effects'][0]:.2f} nats before and {row['effects'][1]:.2f} after. Numbers "
                 "of heads mean the same only within one training.")
    else:
        text += "The two have other numbers of heads, so heads are not compared."
    return text


def comparison_figure(comparison):
    """The Figure of the tokens that changed most, and of each head's effect in both models."""
    rows = shown_tokens(comparison)
    figure = PlainFigure(figsize=(11.5, max(3.6, 1.4 + 0.3 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_tokens(left, comparison, rows)
    draw_effects(right, comparison)
    return figure


def draw_tokens(axes, comparison, rows):
    """Draw the change of some tokens' losses, with intervals. rows: as from `shown_tokens`."""
    n_changed = len(changed(comparison["tokens"]))
    before, after = comparison["losses"]
    bare_axes(axes, f"{n_changed} of {len(comparison['tokens'])} frequent tokens changed;\n"
              f"the mean loss goes from {before:.2f} to {after:.2f} nats",
              "change of the token's loss (nats; below 0: better)", "")
    for y, row in enumerate(rows):
        colour = COLOURS[0] if row["change"] < 0 else COLOURS[1]
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
        axes.plot(row["change"], y, "o", color=colour)
    axes.axvline(0, color="0.8", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{show_spaces(row['token'])}  ×{row['n']:,}"
                                       for row in rows], fontsize=9)
    axes.invert_yaxis()


def draw_effects(axes, comparison):
    """Draw the rise of the loss without each head, in both models."""
    heads = comparison["heads"]
    if not heads:
        bare_axes(axes, "other numbers of heads: not compared", "", "")
        axes.axis("off")
        return

    bare_axes(axes, f"{heads[0]['name']} changes most: {heads[0]['effects'][0]:.2f} to "
              f"{heads[0]['effects'][1]:.2f} nats", "head",
              "rise of the loss without it (nats)")
    for x, row in enumerate(heads):
        axes.plot([x, x], row["effects"], color="0.6", linewidth=1)
    for number, (name, marker) in enumerate(zip(comparison["names"], "os", strict=True)):
        axes.plot(range(len(heads)), [row["effects"][number] for row in heads], marker,
                  color=COLOURS[number], label=name)
    axes.set_xticks(range(len(heads)), [row["name"] for row in heads],
                    rotation=45 if len(heads) > 8 else 0)
    axes.legend(frameon=False, fontsize=9)
