"""What the suppression experiment claims of its models, its figures, and a summary.

The thresholds on the trained models were written down before any was trained, for the most
suppressive head. Four things were changed on seeds 0 to 2: the task and the shape of the model (see
`model`), with them the loss, whose threshold was 0.3 nats; that the heads of a team are removed
together, and asked together whether each token lowers itself; and the claims on the control.

Judged then on seeds 10 to 14, two lines missed their mark: tokens that lower themselves most, by
attention to one kind of key (0.78 with seed 14, the mark was 0.8), and attention of one head, to
one kind of key, to an added unembedding (0.14 with seed 11, the mark was 0.2). In these seeds a
part of the tokens is found in the key after their own, where the first layer has written them. So
the two were asked anew, of all heads of the team and of both keys that can stand for a token: a
presence counts by its writes at both keys, each weighted by the attention paid there, in one
matrix, so that no token gets two chances (the mark stays at 0.8); attention is summed over the
heads, since their writes add up, and the mark is twice the old one, 0.4, what each of two heads
would have to give. The swapped prediction is asked in the same way, its mark doubled too, and a
team may have heads of both kinds. This form, and the claims on the circuit, were chosen on seeds 0
to 2 and 10 to 14. The first forms stand below them, not judged.

Judged once on seeds 20 to 24, after that was written down: every mark holds with each seed. These
five would have passed the first forms as well (0.91 to 1.00, and 0.24 to 0.29).

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: experiments/suppression/measure.py, experiments/suppression/circuit.py
Next: experiments/copy_suppression.py
Source: McDougall et al. 2023
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.common import mean_text, seed_claim
from experiments.suppression.measure import WAYS
from plotting import COLOURS, bare_axes, colour_scale

IGNORE, UNGATED, GATED = WAYS
TESTS = {  # of a circuit, and what each asks
    "equivalence": "beats the model on about half of the pairs",
    "independence": "the rest knows nothing of the answer",
    "minimality": "each edge changes more than a random one",
    "sufficiency": "nearer to the model than 95 % of random circuits",
    "necessity": "more is lost without it than without 95 % of random ones"}


def suppression_claims(seeds, judged=True):
    """[Claim] on what `measure_seed` gave of each. judged: False leaves every claim open."""
    return [*loss_claims(seeds, judged), *head_claims(seeds, judged),
            *intervention_claims(seeds, judged), *circuit_claims(seeds, judged),
            *control_claims(seeds, judged)]


# What a number of the table is


def fact(model, *names):
    """A function of a seed's result: result[model][names[0]][names[1]] …, or nan where the way ends
    at None. model: "trained", "untrained", "control", "nulls", "circuit" or "taken off"."""
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
    or "prediction", then "team" or "head", and for a prediction one of its two kinds of keys; the
    last name: "after" or "random"."""
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
        seed_claim("share of tokens whose presence makes these heads lower them most, where they "
                   "are predicted", seeds, fact("trained", "lowest", "presence"), above=0.8,
                   judged=judged, reported="84.7 % among the ten lowest of 50,257",
                   beside=f"chance 0.031, untrained {untrained('lowest', 'presence')}, texts that "
                          f"go back {mean_text(seeds, fact('control', 'lowest', 'presence'))}"),
        seed_claim("… by attention to one kind of key (the first form of this line: above 0.8)",
                   seeds, fact("trained", "lowest", "team"),
                   beside=f"untrained {untrained('lowest', 'team')}"),
        seed_claim("… and that head alone", seeds, fact("trained", "lowest", "head"),
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
        seed_claim("their attention moves to a token whose unembedding is added to their queries "
                   "(sum over heads, own key and next)", seeds, moved("direction", "team", "after"),
                   above=0.4, judged=judged, reported="follows the prediction",
                   beside="random of that length "
                          f"{mean_text(seeds, moved('direction', 'team', 'random'))}"),
        seed_claim("… that head alone, at one kind of key (the first form: above 0.2)", seeds,
                   moved("direction", "head", "after"),
                   beside=f"random {mean_text(seeds, moved('direction', 'head', 'random'))}"),
        seed_claim("their attention moves to what another text predicts, swapped into their "
                   "queries", seeds, moved("prediction", "team", "new", "after"), above=0.4,
                   judged=judged,
                   beside="random of that length "
                          f"{mean_text(seeds, moved('prediction', 'team', 'new', 'random'))}"),
        seed_claim("… that head alone, at one kind of key (the first form: above 0.2)", seeds,
                   moved("prediction", "head", "new", "after"),
                   beside="random "
                          f"{mean_text(seeds, moved('prediction', 'head', 'new', 'random'))}"),
        seed_claim("share of its effect that copy suppression alone keeps (CSPA)", seeds,
                   fact("trained", "cspa", "lowest"), above=0.5, judged=judged, reported="76.9 %",
                   beside=f"random tokens {mean_text(seeds, fact('trained', 'cspa', 'random'))}, "
                          f"raised ones {mean_text(seeds, fact('trained', 'cspa', 'highest'))}"),
    ]


def circuit_claims(seeds, judged):
    """The circuit that lowers a token because it was seen: what it keeps, and what it stands."""
    cpr = fact("circuit", "cpr")
    random_cpr = fact("circuit", "random cpr")
    lines = [
        seed_claim("taken off a predicted token because it was seen (nats, in pairs of texts)",
                   seeds, fact("taken off", "trained"), above=2, judged=judged,
                   beside=f"untrained {mean_text(seeds, fact('taken off', 'untrained'))}, texts "
                          f"that go back {mean_text(seeds, fact('taken off', 'control'))}"),
        seed_claim("share of it that a circuit keeps on other pairs", seeds,
                   fact("circuit", "faithfulness"), above=0.8, judged=judged,
                   beside=f"{mean_text(seeds, fact('circuit', 'n_edges'))} of 29 edges; the best "
                          f"random one {mean_text(seeds, fact('circuit', 'random'))}"),
        seed_claim("CPR of the ranking by exact edges", seeds, cpr, above=0.6,
                   holds=all(cpr(result) > random_cpr(result) for result in seeds), judged=judged,
                   beside=f"and the best random order {mean_text(seeds, random_cpr)}; EAP-IG "
                          f"{mean_text(seeds, fact('circuit', 'eap cpr'))}"),
        seed_claim("CMD of that ranking", seeds, fact("circuit", "cmd")),
        seed_claim("edges that circuits of other draws of pairs share", seeds,
                   fact("circuit", "stability"),
                   beside=f"chance {mean_text(seeds, fact('circuit', 'by chance'))}"),
    ]
    return lines + [seed_claim(f"{test}: the circuit stands (share of seeds)", seeds,
                               fact("circuit", "tests", test, "holds"), beside=words)
                    for test, words in TESTS.items()]


def circuit_lines(seeds):
    """What the circuit of each seed stands, lines of text to print."""
    lines = []
    for result in seeds:
        seed = result["trained"]["seed"]
        if result["circuit"] is None:
            lines.append(f"Seed {seed}: too little is taken off to look for a circuit.")
        else:
            lines += [f"Seed {seed}, the circuit:", *(f"  {line}"
                                                      for line in result["circuit"]["lines"])]
    return lines


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
    rise = mean_text(seeds, moved("direction", "team", "after"))
    by_random = mean_text(seeds, moved("direction", "team", "random"))
    above = mean_text(seeds, fact("trained", "above"))
    ungated = mean_text(seeds, fact("nulls", UNGATED))
    return (f"The most suppressive heads of each seed are {heads}: a token that was seen and is "
            f"predicted gets {to_predicted} times an even share of the first one's attention, one "
            f"that is not predicted {to_others} times. Where another token is made to be "
            f"predicted, the attention of all of them to it rises by {rise} (random patch: "
            f"{by_random}). The models lie {above} nats above the floor; suppressing all that was "
            f"seen lies {ungated} above it. Look at suppression.png.")


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
        **{f"unembedding added: {name}": fact("trained", "direction", "team", name)
           for name in ("before", "random", "after")},
        **{f"prediction swapped: {name}": fact("trained", "prediction", "team", "new", name)
           for name in ("before", "random", "after")}})
    rise = mean_text(seeds, moved("direction", "team", "after"))
    bare_axes(patches, f"Attention follows the prediction: +{rise}",
              "attention to the token, summed over such heads", "")

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
