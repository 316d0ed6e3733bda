"""Report the suppression experiment: its claims, its summary and its figures.

How the thresholds were chosen. Those for trained models were written down before any model was
trained, for the most suppressive head. Four things were changed on seeds 0 to 2: the task; the
shape of the model (see `model`), and with both the threshold of the loss, which was 0.3 nats; the
heads of a team, which are now removed together and judged together on whether each token lowers
itself; and the claims about the control.

On seeds 10 to 14, two lines then missed their thresholds. One was the share of tokens that lower
themselves most, by attention to one kind of key (0.78 with seed 14; the threshold was 0.8). The
other was the attention of one head, to one kind of key, to an added unembedding (0.14 with seed 11;
the threshold was 0.2). In these seeds some tokens are found at the key after their own, where the
first layer has written them. So the two lines were changed to cover all heads of the team and both
keys that can stand for a token. For the first line, the writes at both keys are weighted by the
attention to them and added in one matrix, so that no token gets two chances; the threshold stays at
0.8. For the second, attention is summed over the heads, because their writes add up, and the
threshold is doubled to 0.4, as if each of two heads had to reach the old one. The line about the
swapped prediction was changed in the same way, its threshold was doubled too, and a team may have
heads of both kinds. This form, and the claims about the circuit, were chosen on seeds 0 to 2 and 10
to 14. The first forms are shown below the new ones, without a verdict.

After this was written down, seeds 20 to 24 were judged once: every threshold holds with each seed.
These five would have passed the first forms as well (0.91 to 1.00, and 0.24 to 0.29).

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
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
    "independence": "the rest does not know the answer",
    "minimality": "each edge changes more than a random edge",
    "sufficiency": "closer to the model than 95 % of random circuits",
    "necessity": "removing it costs more than removing 95 % of random circuits"}


def suppression_claims(seeds, judged=True):
    """[Claim] from what `measure_seed` returned for each seed. judged: False leaves every claim
    open."""
    return [*loss_claims(seeds, judged), *head_claims(seeds, judged),
            *intervention_claims(seeds, judged), *circuit_claims(seeds, judged),
            *control_claims(seeds, judged)]


# The numbers of the table


def fact(model, *names):
    """A function of a seed's result that returns result[model][names[0]][names[1]] …, or nan if one
    of these is None. model: "trained", "untrained", "control", "nulls", "circuit" or "taken off".
    """
    def value(result):
        found = result[model]
        for name in names:
            if found is None:
                return float("nan")
            found = found[name]
        return found
    return value


def moved(kind, *names, model="trained"):
    """A function of a seed's result that returns the rise of attention under a patch.

    kind: "direction" or "prediction". names: "team" or "head"; for a prediction one of its two
    kinds of keys; then "after" or "random".
    """
    *way, which = names
    after = fact(model, kind, *way, which)
    before = fact(model, kind, *way, "before")
    return lambda result: after(result) - before(result)


def strongest_gated(model):
    """A function of a seed's result that returns the most negative `gated` of any head."""
    return lambda result: min(head["gated"] for head in result[model]["heads"].values())


# The claims


def loss_claims(seeds, judged):
    """The model beats predictors that ignore what was seen, and those that suppress all of it."""
    ignoring = mean_text(seeds, fact("nulls", IGNORE))
    ungated = mean_text(seeds, fact("nulls", UNGATED))
    return [
        seed_claim("the floor: the lowest possible loss (nats)", seeds, fact("trained", "floor"),
                   beside="exact"),
        seed_claim("the model above that floor (nats)", seeds, fact("trained", "above"), below=0.1,
                   median=True, judged=judged,
                   beside=f"best predictor that ignores what was seen {ignoring}, best that "
                          f"suppresses all of it {ungated}"),
    ]


def head_claims(seeds, judged):
    """The attention of the most suppressive head, and what it and its team write."""
    def untrained(*names):
        return mean_text(seeds, fact("untrained", *names))

    return [
        seed_claim("most suppressive head: attention to a key that is predicted (1: an even share)",
                   seeds,
                   fact("trained", "suppressor", "to predicted"), above=2, judged=judged,
                   reported="attends to it",
                   beside=f"untrained {untrained('suppressor', 'to predicted')}"),
        seed_claim("… to a key that is not predicted", seeds,
                   fact("trained", "suppressor", "to others"), below=0.8, judged=judged,
                   beside=f"untrained {untrained('suppressor', 'to others')}"),
        seed_claim("… direct effect on predicted tokens, seen minus unseen, beyond that on others "
                   "(nats)", seeds, fact("trained", "suppressor", "gated"), below=-1, judged=judged,
                   beside=f"untrained {untrained('suppressor', 'gated')}"),
        seed_claim("heads of its kind: share of tokens that they lower most because the token is "
                   "in the text", seeds, fact("trained", "lowest", "presence"), above=0.8,
                   judged=judged, reported="84.7 % among the ten lowest of 50,257",
                   beside=f"chance 0.031, untrained {untrained('lowest', 'presence')}, texts that "
                          f"go back {mean_text(seeds, fact('control', 'lowest', 'presence'))}"),
        seed_claim("… by attention to one kind of key (the first form of this line: above 0.8)",
                   seeds, fact("trained", "lowest", "team"),
                   beside=f"untrained {untrained('lowest', 'team')}"),
        seed_claim("… by the most suppressive head alone", seeds, fact("trained", "lowest", "head"),
                   beside=f"number of heads of its kind: "
                          f"{mean_text(seeds, lambda result: len(result['trained']['team']))}"),
    ]


def intervention_claims(seeds, judged):
    """The effects of removing heads, of patching the prediction, and of CSPA."""
    free = mean_text(seeds, fact("trained", "ablation", "team", "free"))
    alone = mean_text(seeds, fact("trained", "ablation", "head", "naive copy"))

    return [
        seed_claim("these heads removed: rise of the loss where the likeliest successor was seen "
                   "(nats)", seeds,
                   fact("trained", "ablation", "team", "naive copy"), above=0.3, judged=judged,
                   beside=f"where no successor was seen {free}; the first head alone {alone}"),
        seed_claim("a token's unembedding added to their queries: rise of their attention to it "
                   "(sum over heads, own key and next)", seeds, moved("direction", "team", "after"),
                   above=0.4, median=True, judged=judged, reported="follows the prediction",
                   beside="random direction "
                          f"{mean_text(seeds, moved('direction', 'team', 'random'))}"),
        seed_claim("… the first head alone, at one kind of key (the first form: above 0.2)", seeds,
                   moved("direction", "head", "after"),
                   beside=f"random {mean_text(seeds, moved('direction', 'head', 'random'))}"),
        seed_claim("another text's prediction in their queries: rise of attention to its tokens",
                   seeds, moved("prediction", "team", "new", "after"), above=0.4,
                   judged=judged,
                   beside="random direction "
                          f"{mean_text(seeds, moved('prediction', 'team', 'new', 'random'))}"),
        seed_claim("… the first head alone, at one kind of key (the first form: above 0.2)", seeds,
                   moved("prediction", "head", "new", "after"),
                   beside="random "
                          f"{mean_text(seeds, moved('prediction', 'head', 'new', 'random'))}"),
        seed_claim("share of the first head's effect that copy suppression keeps (CSPA)", seeds,
                   fact("trained", "cspa", "lowest"), above=0.5, median=True, judged=judged,
                   reported="76.9 %",
                   beside="keeping random tokens "
                          f"{mean_text(seeds, fact('trained', 'cspa', 'random'))}, tokens raised "
                          f"most {mean_text(seeds, fact('trained', 'cspa', 'highest'))}"),
    ]


def circuit_claims(seeds, judged):
    """The circuit that lowers a token because it was seen: its faithfulness, and its tests."""
    cpr = fact("circuit", "cpr")
    random_cpr = fact("circuit", "random cpr")
    lines = [
        seed_claim("suppression of a predicted token because it was seen (nats, pairs of texts)",
                   seeds, fact("taken off", "trained"), above=2, judged=judged,
                   beside=f"untrained {mean_text(seeds, fact('taken off', 'untrained'))}, texts "
                          f"that go back {mean_text(seeds, fact('taken off', 'control'))}"),
        seed_claim("share of it that the circuit keeps on other pairs", seeds,
                   fact("circuit", "faithfulness"), above=0.8, judged=judged,
                   beside=f"{mean_text(seeds, fact('circuit', 'n_edges'))} of 29 edges; the best "
                          f"random circuit {mean_text(seeds, fact('circuit', 'random'))}"),
        seed_claim("CPR of the ranking by exact edges", seeds, cpr, above=0.6, median=True,
                   holds=all(cpr(result) > random_cpr(result) for result in seeds), judged=judged,
                   beside=f"best random order {mean_text(seeds, random_cpr)}; EAP-IG "
                          f"{mean_text(seeds, fact('circuit', 'eap cpr'))}"),
        seed_claim("CMD of that ranking", seeds, fact("circuit", "cmd")),
        seed_claim("Jaccard index of circuits from different draws of pairs", seeds,
                   fact("circuit", "stability"),
                   beside=f"chance {mean_text(seeds, fact('circuit', 'by chance'))}"),
    ]

    return lines + [seed_claim(f"{test}: the circuit passes (share of seeds)", seeds,
                               fact("circuit", "tests", test, "holds"), beside=words)
                    for test, words in TESTS.items()]


def circuit_lines(seeds):
    """The tests of each seed's circuit, as lines of text to print."""
    lines = []
    for result in seeds:
        seed = result["trained"]["seed"]
        if result["circuit"] is None:
            lines.append(f"Seed {seed}: the model suppresses too little to look for a circuit.")
        else:
            lines += [f"Seed {seed}, the circuit:", *(f"  {line}"
                                                      for line in result["circuit"]["lines"])]
    return lines


def control_claims(seeds, judged):
    """In texts where a seen successor can come again, no suppression head forms."""
    return [
        seed_claim("texts that go back: most negative direct effect of any head (nats)", seeds,
                   strongest_gated("control"), above=-0.3, judged=judged),
        seed_claim("texts that go back: above their floor (nats)", seeds,
                   fact("control", "above"), beside="the model learns these texts"),
    ]


# The summary


def describe_findings(seeds):
    """Three sentences that say what was found."""
    heads = ", ".join(f"{' + '.join(result['trained']['team'])} (seed {result['trained']['seed']})"
                      for result in seeds)
    to_predicted = mean_text(seeds, fact("trained", "suppressor", "to predicted"))
    to_others = mean_text(seeds, fact("trained", "suppressor", "to others"))
    rise = mean_text(seeds, moved("direction", "team", "after"))
    by_random = mean_text(seeds, moved("direction", "team", "random"))
    above = mean_text(seeds, fact("trained", "above"))
    ungated = mean_text(seeds, fact("nulls", UNGATED))
    return (f"The most suppressive heads are {heads}. A seen token that is predicted gets "
            f"{to_predicted} times an even share of the strongest head's attention, and one that "
            f"is not predicted {to_others} times; when the stream is patched to predict another "
            f"token, the heads' attention to it rises by {rise} (random patch: {by_random}). The "
            f"models are {above} nats above the floor, while suppressing everything that was seen "
            f"ends {ungated} nats above it (suppression.png).")


# The figures


def suppression_figures(seeds):
    """{name: Figure} from the results of all seeds."""
    return {"suppression": draw_overview(seeds), "written": draw_written(seeds[0]["trained"])}


def draw_overview(seeds):
    """The Figure of losses, attention, patches and ablations, with a dot for each seed."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    (losses, attention), (patches, costs) = figure.subplots(2, 2)

    draw_dots(losses, seeds, {"best predictor that\nignores what was seen": fact("nulls", IGNORE),
                              "best predictor that\nsuppresses all of it": fact("nulls", UNGATED),
                              "the model": fact("trained", "above")})
    above = mean_text(seeds, fact("trained", "above"))
    losses.set_xlim(left=0)
    bare_axes(losses, f"The model's loss is {above} nats above the lowest possible one",
              "loss above the lowest possible one (nats/token)", "")

    draw_dots(attention, seeds, {
        f"{words}: {kind}": fact(model, "suppressor", name)
        for model, words in (("trained", "trained"), ("control", "texts without the rule"),
                             ("untrained", "untrained"))
        for name, kind in (("to predicted", "predicted"), ("to others", "not predicted"))})
    attention.axvline(1, color="0.55", linewidth=1, linestyle="--")
    to_predicted = mean_text(seeds, fact("trained", "suppressor", "to predicted"))
    attention.set_xlim(left=0)
    bare_axes(attention, f"A predicted token gets {to_predicted} times an even share",
              "attention to a token that was seen, in even shares", "")

    draw_dots(patches, seeds, {
        "before adding": fact("trained", "direction", "team", "before"),
        "a random direction added": fact("trained", "direction", "team", "random"),
        "the token's unembedding added": fact("trained", "direction", "team", "after"),
        "before swapping": fact("trained", "prediction", "team", "new", "before"),
        "a random change of that size": fact("trained", "prediction", "team", "new", "random"),
        "another text's prediction swapped in": fact("trained", "prediction", "team", "new",
                                                     "after")})
    rise = mean_text(seeds, moved("direction", "team", "after"))
    patches.set_xlim(left=0)
    bare_axes(patches, f"Attention follows the prediction: it rises by {rise}",
              "attention to the token, summed over the suppressive heads", "")

    draw_dots(costs, seeds, {
        f"{words} removed,\n{place}": fact("trained", "ablation", who, name)
        for who, words in (("team", "all suppressive heads"), ("head", "the strongest one"))
        for name, place in (("naive copy", "likeliest successor already seen"),
                            ("free", "no successor seen"))})
    costs.axvline(0, color="0.2", linewidth=0.8)
    cost = mean_text(seeds, fact("trained", "ablation", "team", "naive copy"))
    bare_axes(costs, f"Without the heads the loss rises by {cost} nats",
              "rise of the loss (nats/token)", "")
    return figure


def draw_dots(axes, seeds, rows):
    """Draw a row for each {name: value(result)}, with a dot for each seed."""
    for y, value in enumerate(rows.values()):
        axes.plot([value(result) for result in seeds], [y] * len(seeds), "o", color=COLOURS[0],
                  alpha=0.6)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def draw_written(found):
    """The Figure of what attention to each token adds to each logit, by each head of a team and by
    all of them together."""
    parts = {label: np.array(values) for label, values in found["written"].items()}
    if len(parts) > 1:
        parts["together"] = sum(parts.values())
    _, scale = colour_scale(np.stack(list(parts.values())))

    figure = Figure(figsize=(1.6 + 3.6 * len(parts), 4.2), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(parts), squeeze=False)[0],
                                     parts.items(), strict=True):
        lowest = np.mean(values.argmin(1) == np.arange(len(values)))
        bare_axes(axes, f"{label}: {100 * lowest:.0f} % of tokens lower themselves most",
                  "token whose logit changes", "token that is attended to")
        image = axes.imshow(values, **scale)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="change of the logit (nats)")
    return figure
