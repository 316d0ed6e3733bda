"""What the suppression experiment claims of its models, its figures, and a summary.

The thresholds on the trained models were written down before any was trained, for the most
suppressive head. Four things were changed on seeds 0 to 2: the task and the shape of the model (see
`model`), with them the loss, whose threshold was 0.3 nats; that the heads of a team are asked
together whether each token lowers itself, and removed together; and the claims on the control.
Judged then on seeds 10 to 14, two lines missed their mark: tokens that lower themselves (0.78 with
seed 14, the mark is 0.8) and attention to an added unembedding (0.14 with seed 11, the mark is
0.2); the marks stay. In these seeds the heads find a part of the tokens in the key after their own,
where the first layer's previous-token head has written them.

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: experiments/suppression/measure.py
Next: experiments/copy_suppression.py
Source: McDougall et al. 2023
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.common import mean_text, seed_claim
from experiments.suppression.measure import WAYS
from plotting import COLOURS, bare_axes, colour_scale

IGNORE, UNGATED, GATED = WAYS


def suppression_claims(seeds, judged=True):
    """[Claim] on what `measure_seed` gave of each. judged: False leaves every claim open."""
    return [*loss_claims(seeds, judged), *head_claims(seeds, judged),
            *intervention_claims(seeds, judged), *control_claims(seeds, judged)]


# What a number of the table is


def fact(model, *names):
    """A function of a seed's result: result[model][names[0]][names[1]] …, or nan where the way ends
    at None. model: "trained", "untrained", "control" or "nulls"."""
    def value(result):
        found = result[model]
        for name in names:
            if found is None:
                return float("nan")
            found = found[name]
        return found
    return value


def moved(kind, *names, model="trained"):
    """A function of a seed's result: by how much attention rises under a patch. kind: "direction",
    or "prediction" and one of its two kinds of keys; the last name: "after" or "random"."""
    *way, which = names
    after = fact(model, kind, *way, which)
    before = fact(model, kind, *way, "before")
    return lambda result: after(result) - before(result)


def strongest_gated(model):
    """A function of a seed's result: the most negative `gated` of any head."""
    return lambda result: min(head["gated"] for head in result[model]["heads"].values())


# The claims


def loss_claims(seeds, judged):
    """The model predicts what no predictor does that ignores what was seen, or suppresses all."""
    ignoring = mean_text(seeds, fact("nulls", IGNORE))
    ungated = mean_text(seeds, fact("nulls", UNGATED))
    return [
        seed_claim("the least that a prediction can cost (nats)", seeds, fact("trained", "floor"),
                   beside="exact"),
        seed_claim("the model above that floor (nats)", seeds, fact("trained", "above"), below=0.1,
                   judged=judged,
                   beside=f"best that ignores what was seen {ignoring}, that suppresses all of it "
                          f"{ungated}"),
    ]


def head_claims(seeds, judged):
    """Where the most suppressive head looks, and what it and its team write."""
    def untrained(*names):
        return mean_text(seeds, fact("untrained", *names))

    return [
        seed_claim("its attention to a key that is predicted (1: an even share)", seeds,
                   fact("trained", "suppressor", "to predicted"), above=2, judged=judged,
                   reported="attends to it",
                   beside=f"untrained {untrained('suppressor', 'to predicted')}"),
        seed_claim("its attention to a key that is not", seeds,
                   fact("trained", "suppressor", "to others"), below=0.8, judged=judged,
                   beside=f"untrained {untrained('suppressor', 'to others')}"),
        seed_claim("its write to what is predicted, seen less unseen, beyond that to others (nats)",
                   seeds, fact("trained", "suppressor", "gated"), below=-1, judged=judged,
                   beside=f"untrained {untrained('suppressor', 'gated')}"),
        seed_claim("share of tokens that attention to them lowers most, heads of its kind together",
                   seeds, fact("trained", "lowest", "team"), above=0.8, judged=judged,
                   reported="84.7 % among the ten lowest of 50,257",
                   beside=f"chance 0.031, untrained {untrained('lowest', 'team')}"),
        seed_claim("… where they stand at their own key or in the next (asked after the fact)",
                   seeds, fact("trained", "lowest", "either"),
                   beside=f"untrained {untrained('lowest', 'either')}"),
        seed_claim("… that head alone", seeds, fact("trained", "lowest", "head"),
                   beside=f"heads of its kind: "
                          f"{mean_text(seeds, lambda result: len(result['trained']['team']))}"),
    ]


def intervention_claims(seeds, judged):
    """What happens without the head, with another prediction, and with copy suppression alone."""
    free = mean_text(seeds, fact("trained", "ablation", "team", "free"))
    alone = mean_text(seeds, fact("trained", "ablation", "head", "naive copy"))
    return [
        seed_claim("cost without these heads where the likeliest successor was seen (nats)", seeds,
                   fact("trained", "ablation", "team", "naive copy"), above=0.3, judged=judged,
                   beside=f"where none was {free}; without the one {alone}"),
        seed_claim("its attention moves to a token whose unembedding is added to its query", seeds,
                   moved("direction", "after"), above=0.2, judged=judged,
                   reported="follows the prediction",
                   beside="random of that length "
                          f"{mean_text(seeds, moved('direction', 'random'))}"),
        seed_claim("its attention moves to what another text predicts, swapped into its query",
                   seeds, moved("prediction", "new", "after"), above=0.2, judged=judged,
                   beside="random of that length "
                          f"{mean_text(seeds, moved('prediction', 'new', 'random'))}"),
        seed_claim("share of its effect that copy suppression alone keeps (CSPA)", seeds,
                   fact("trained", "cspa", "lowest"), above=0.5, judged=judged, reported="76.9 %",
                   beside=f"random tokens {mean_text(seeds, fact('trained', 'cspa', 'random'))}, "
                          f"raised ones {mean_text(seeds, fact('trained', 'cspa', 'highest'))}"),
    ]


def control_claims(seeds, judged):
    """The same training on texts in which a successor can come again: no such head forms."""
    return [
        seed_claim("texts that go back: the most suppressive write of any head (nats)", seeds,
                   strongest_gated("control"), above=-0.3, judged=judged),
        seed_claim("texts that go back: above their floor (nats)", seeds,
                   fact("control", "above"), beside="they are learned"),
    ]


# The summary


def describe_findings(seeds):
    """Three plain sentences on what was found, whatever it was."""
    heads = ", ".join(" + ".join(result["trained"]["team"]) for result in seeds)
    to_predicted = mean_text(seeds, fact("trained", "suppressor", "to predicted"))
    to_others = mean_text(seeds, fact("trained", "suppressor", "to others"))
    rise = mean_text(seeds, moved("direction", "after"))
    by_random = mean_text(seeds, moved("direction", "random"))
    above = mean_text(seeds, fact("trained", "above"))
    ungated = mean_text(seeds, fact("nulls", UNGATED))
    return (f"The most suppressive heads of each seed are {heads}: a token that was seen and is "
            f"predicted gets {to_predicted} times an even share of the first one's attention, one "
            f"that is not predicted {to_others} times. Where another token is made to be "
            f"predicted, the share that it gets rises by {rise} (random patch: {by_random}). The "
            f"models lie {above} nats above the floor; suppressing all that was seen lies "
            f"{ungated} above it. Look at suppression.png.")


# The figures


def suppression_figures(seeds):
    """{name: Figure} of what was measured."""
    return {"suppression": draw_overview(seeds), "written": draw_written(seeds[0]["trained"])}


def draw_overview(seeds):
    """Losses, attention, patches and ablations, a dot for each seed."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    (losses, attention), (patches, costs) = figure.subplots(2, 2)

    draw_dots(losses, seeds, {"best that ignores what was seen": fact("nulls", IGNORE),
                              "best that suppresses all of it": fact("nulls", UNGATED),
                              "the model": fact("trained", "above")})
    above = mean_text(seeds, fact("trained", "above"))
    bare_axes(losses, f"The model is {above} nats above the floor", "above the floor (nats/token)",
              "")

    draw_dots(attention, seeds, {
        f"{words}: {kind}": fact(model, "suppressor", name)
        for model, words in (("trained", "trained"), ("control", "texts that go back"),
                             ("untrained", "untrained"))
        for name, kind in (("to predicted", "predicted"), ("to others", "not predicted"))})
    attention.axvline(1, color="0.55", linewidth=1, linestyle="--")
    to_predicted = mean_text(seeds, fact("trained", "suppressor", "to predicted"))
    bare_axes(attention, f"What is predicted gets {to_predicted} even shares",
              "attention to a key (1: an even share)", "")

    draw_dots(patches, seeds, {
        **{f"unembedding added: {name}": fact("trained", "direction", name)
           for name in ("before", "random", "after")},
        **{f"prediction swapped: {name}": fact("trained", "prediction", "new", name)
           for name in ("before", "random", "after")}})
    rise = mean_text(seeds, moved("direction", "after"))
    bare_axes(patches, f"Attention follows the prediction: +{rise}",
              "share of attention to the token", "")

    draw_dots(costs, seeds, {
        f"{words} removed,\n{place}": fact("trained", "ablation", who, name)
        for who, words in (("team", "all such heads"), ("head", "the first"))
        for name, place in (("naive copy", "likeliest successor seen"),
                            ("free", "no successor seen"))})
    costs.axvline(0, color="0.2", linewidth=0.8)
    cost = mean_text(seeds, fact("trained", "ablation", "team", "naive copy"))
    bare_axes(costs, f"Without them a naive copy costs {cost} nats",
              "rise of the loss (nats/token)", "")
    return figure


def draw_dots(axes, seeds, rows):
    """A row for each {name: value(result)}, with a dot for each seed."""
    for y, value in enumerate(rows.values()):
        axes.plot([value(result) for result in seeds], [y] * len(seeds), "o", color=COLOURS[0],
                  alpha=0.6)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def draw_written(found):
    """What attention to each token adds to each logit: each head of a team, and all together."""
    parts = {label: np.array(values) for label, values in found["written"].items()}
    if len(parts) > 1:
        parts["together"] = sum(parts.values())
    _, scale = colour_scale(np.stack(list(parts.values())))

    figure = Figure(figsize=(1.6 + 3.6 * len(parts), 4.2), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(parts), squeeze=False)[0],
                                     parts.items(), strict=True):
        lowest = np.mean(values.argmin(1) == np.arange(len(values)))
        bare_axes(axes, f"{label}: {100 * lowest:.0f} % lower themselves most",
                  "token whose logit changes", "token that is attended to")
        image = axes.imshow(values, **scale)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="change of the logit (nats)")
    return figure
