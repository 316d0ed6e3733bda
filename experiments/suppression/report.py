"""What the suppression experiment claims of its models, its figures, and a summary.

The thresholds were written down before any model was trained.

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: experiments/suppression/measure.py
Next: experiments/copy_suppression.py
Source: McDougall et al. 2023
"""

from dataclasses import replace
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from experiments.common import claim
from experiments.suppression.measure import CSPA_PAIRS, WAYS
from plotting import COLOURS, bare_axes, colour_scale

CHANCE_LOWEST = "1 of 32 by chance"
PAIRS = CSPA_PAIRS[-1]


def suppression_claims(seeds, judged=True):
    """[Claim] on what the program measured of each seed. judged: False leaves every claim open."""
    return [*loss_claims(seeds, judged), *head_claims(seeds, judged),
            *intervention_claims(seeds, judged), *contrast_claims(seeds)]


def seed_claim(text, seeds, value, beside=None, **how):
    """A `claim` on value(result) of every seed; how: as in `claim`. beside: what else the same
    measurement gives, named behind the threshold."""
    line = claim(text, [value(result) for result in seeds], **how)
    if beside is None:
        return line
    return replace(line, control=f"{line.control}; {beside}" if line.control else beside)


def mean_of(seeds, value):
    """The mean of value(result) over the seeds, as a text of two digits."""
    return f"{fmean(map(value, seeds)):.2g}"


def loss_claims(seeds, judged):
    """The model does what no predictor does that ignores what was seen, or suppresses all of it."""
    nulls = {way: mean_of(seeds, lambda result, way=way: result["computed nulls"][way])
             for way in WAYS}
    return [
        seed_claim("the least that a prediction can cost (nats)", seeds,
                   lambda result: result["computed"]["floor"], beside="exact"),
        seed_claim("the model above that floor (nats)", seeds,
                   lambda result: result["computed"]["above"], below=0.3, judged=judged,
                   beside=f"ignores what was seen {nulls[WAYS[0]]}, suppresses all "
                          f"of it {nulls[WAYS[1]]}"),
    ]


def head_claims(seeds, judged):
    """Where the head looks, and what it writes."""
    def untrained(name):
        return mean_of(seeds, lambda result: result["computed untrained"]["suppressor"][name])

    def of_head(name):
        return lambda result: result["computed"]["suppressor"][name]

    return [
        seed_claim("attention to a key that is predicted (1: an even share)", seeds,
                   of_head("to predicted"), above=2, judged=judged, reported="attends to it",
                   beside=f"untrained {untrained('to predicted')}"),
        seed_claim("attention to a key that is not predicted", seeds, of_head("to others"),
                   below=0.8, judged=judged, beside=f"untrained {untrained('to others')}"),
        seed_claim("tokens that are the lowest in what attention to them writes", seeds,
                   of_head("lowest"), above=0.8, judged=judged,
                   reported="84.7 %, among ten of 50,257",
                   beside=f"{CHANCE_LOWEST}, untrained {untrained('lowest')}"),
        seed_claim("its write to a predicted token, seen less unseen, beyond that to others (nats)",
                   seeds, of_head("gated"), below=-1, judged=judged,
                   beside=f"untrained {untrained('gated')}"),
    ]


def intervention_claims(seeds, judged):
    """What happens without the head, with another prediction, and with copy suppression alone."""
    def patched(kind, *names):
        def value(result):
            shares = result["computed"][kind] or {}
            for name in names[:-1]:
                shares = shares.get(name, {})
            return shares[names[-1]] - shares["before"] if shares else float("nan")
        return value

    def ablation(name):
        return lambda result: result["computed"]["ablation"][name]

    def cspa(written):
        return lambda result: result["computed"]["cspa"][f"{written} {PAIRS}"]

    return [
        seed_claim("cost without the head where the likeliest successor was seen (nats)", seeds,
                   ablation("naive copy"), above=0.3, judged=judged,
                   beside=f"where none was seen {mean_of(seeds, ablation('free'))}"),
        seed_claim("attention moves to a seen token whose unembedding is added to its query", seeds,
                   patched("direction", "after"), above=0.2, judged=judged,
                   reported="follows the prediction",
                   beside="random direction of that length "
                          f"{mean_of(seeds, patched('direction', 'random'))}"),
        seed_claim("attention moves to what another text predicts, swapped into its query", seeds,
                   patched("prediction", "new", "after"), above=0.2, judged=judged,
                   beside="random direction of that length "
                          f"{mean_of(seeds, patched('prediction', 'new', 'random'))}"),
        seed_claim("share of its effect that copy suppression alone keeps (CSPA)", seeds,
                   cspa("lowest"), above=0.5, judged=judged, reported="76.9 %",
                   beside=f"random tokens {mean_of(seeds, cspa('random'))}, those it raises "
                          f"{mean_of(seeds, cspa('highest'))}"),
    ]


def contrast_claims(seeds):
    """The task in which the last token itself says what is predicted: for information."""
    def of_head(name):
        return lambda result: result["current"]["suppressor"][name]

    return [
        seed_claim("successors of the last token instead: above the floor (nats)", seeds,
                   lambda result: result["current"]["above"]),
        seed_claim("… attention to a key that is predicted (1: an even share)", seeds,
                   of_head("to predicted")),
        seed_claim("… tokens that are the lowest in what attention to them writes", seeds,
                   of_head("lowest")),
    ]


# The summary


def describe_findings(seeds):
    """Two plain sentences on what was found, whatever it was."""
    to_predicted = mean_of(seeds, lambda result: result["computed"]["suppressor"]["to predicted"])
    to_others = mean_of(seeds, lambda result: result["computed"]["suppressor"]["to others"])
    above = mean_of(seeds, lambda result: result["computed"]["above"])
    ungated = mean_of(seeds, lambda result: result["computed nulls"][WAYS[1]])
    heads = ", ".join(result["computed"]["label"] for result in seeds)
    return (f"The most suppressive heads are {heads}: they pay a token that is predicted and was "
            f"seen {to_predicted} times an even share of their attention, and one that is not "
            f"predicted {to_others} times. The models lie {above} nats above the floor, where "
            f"suppressing all that was seen lies {ungated} above it. Look at suppression.png.")


# The figures


def suppression_figures(seeds):
    """{name: Figure} of what the program measured."""
    return {"suppression": overview(seeds), "written": written_figure(seeds[0]["computed"])}


def overview(seeds):
    """Losses, attention, patches and ablations, a dot for each seed."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (losses, attention), (patches, costs) = figure.subplots(2, 2)

    # Losses above the floor
    rows = {way: lambda result, way=way: result["computed nulls"][way] for way in WAYS}
    rows["the model"] = lambda result: result["computed"]["above"]
    dots(losses, rows, seeds)
    above = mean_of(seeds, rows["the model"])
    bare_axes(losses, f"The model is {above} nats above the floor", "above the floor (nats/token)",
              "")

    # Attention of the suppressive head
    rows = {}
    for name, model in (("untrained", "computed untrained"), ("trained", "computed")):
        for kind in ("predicted", "others"):
            rows[f"{name}, to {kind}"] = (
                lambda result, model=model, kind=kind: result[model]["suppressor"][f"to {kind}"])
    dots(attention, rows, seeds)
    attention.axvline(1, color="0.55", linewidth=1, linestyle="--")
    to_predicted = mean_of(seeds, lambda result: result["computed"]["suppressor"]["to predicted"])
    bare_axes(attention, f"It pays {to_predicted} even shares to what is predicted",
              "attention to a seen key (1: an even share)", "")

    # Patches of its query
    rows = {}
    for name in ("before", "random", "after"):
        rows[f"unembedding added: {name}"] = (
            lambda result, name=name: result["computed"]["direction"][name])
    for name in ("before", "random", "after"):
        rows[f"prediction swapped: {name}"] = (
            lambda result, name=name: ((result["computed"]["prediction"] or {}).get("new", {})
                                       .get(name, float("nan"))))
    dots(patches, rows, seeds)
    moved = mean_of(seeds, lambda result: result["computed"]["direction"]["after"]
                    - result["computed"]["direction"]["before"])
    bare_axes(patches, f"Its attention to a token rises by {moved} when that is predicted",
              "share of attention to the token", "")

    # Ablations
    rows = {"head removed: likeliest successor seen":
            lambda result: result["computed"]["ablation"]["naive copy"],
            "head removed: no successor seen":
            lambda result: result["computed"]["ablation"]["free"]}
    dots(costs, rows, seeds)
    costs.axvline(0, color="0.2", linewidth=0.8)
    cost = mean_of(seeds, lambda result: result["computed"]["ablation"]["naive copy"])
    bare_axes(costs, f"Without it naive copies cost {cost} nats more",
              "rise above the floor (nats/token)", "")
    return figure


def dots(axes, rows, seeds):
    """A row for each {name: value(result)}, with a dot for each seed."""
    for y, value in enumerate(rows.values()):
        axes.plot([value(result) for result in seeds], [y] * len(seeds), "o", color=COLOURS[0],
                  alpha=0.6)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def written_figure(found):
    """What attention to each token adds to each logit, for one model's head."""
    written = np.array(found["written"])
    values, scale = colour_scale(written)
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    lowest = found["suppressor"]["lowest"]
    axes = bare_axes(figure.subplots(), f"{found['label']}, seed {found['seed']}: "
                     f"{100 * lowest:.0f} % of tokens lower themselves most", "token whose logit "
                     "changes", "token that is attended to")
    image = axes.imshow(values, **scale)
    figure.colorbar(image, ax=axes, shrink=0.8,
                    label="change of the logit (nats, up to LayerNorm's scale)")
    return figure
