"""What is said of trainings that grok: the lines of the table, a summary, and the figures of when
what is known and of the waves in the logits.

A run is what `measure_training` returns; runs are {name: run}, of which those whose names have
"seed_" in them are the trainings, and the others their controls.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Prerequisites: plotting.py, experiments/grokking/measure.py
Next: experiments/grokking_experiment.py
Source: Nanda et al. 2023, *Progress measures for grokking*
"""

import math
from dataclasses import replace

from matplotlib.figure import Figure

from experiments.common import claim
from experiments.grokking.measure import FITTED_SHARE, N_BEST
from plotting import COLOURS, bare_axes


def claims_of_grokking(runs, p, symmetric, *, judged=True):
    """The table's lines, [Claim]. symmetric: (a, b) was trained on with (b, a) or not at all."""
    seeds = seed_runs(runs)
    return [*timing_claims(seeds, p, symmetric, judged=judged),
            *wave_claims(seeds, p, judged=judged),
            *control_claims(runs, judged=judged)]


def seed_runs(runs):
    """The runs that are no controls, a list."""
    return [run for name, run in runs.items() if "seed_" in name]


def claim_beside(text, values, beside, **more):
    """A Claim, as `common.claim` makes it, that shows another number beside its threshold."""
    line = claim(text, values, **more)
    return replace(line, control="; ".join(filter(None, (line.control, beside))))


def timing_claims(seeds, p, symmetric, *, judged):
    """What is reached when."""
    when = {moment: [run["when"][moment] for run in seeds] for moment in seeds[0]["when"]}
    known_later = divide(when["test_known"], when["train_known"])
    falls_later = divide(when["test_loss_falls"], when["unseen_falls"])
    others = ", ".join(f"{step:.4g}" for step in when["unseen_others_falls"])
    half_way = math.log(p) / 2
    return [
        claim("step at which 99 % of the training pairs are right", when["train_known"]),
        claim_beside("other pairs right at that step, share",
                     [others_right_then(run) for run in seeds], f"chance {1 / p:.2g}",
                     below=0.05, judged=judged and symmetric),
        claim("99 % of the others are right so many times later", known_later, above=5,
              holds=all(map(math.isfinite, known_later)), judged=judged,
              reported="Nanda et al.: 6.7 to 10"),
        claim_beside(
            f"below {half_way:.2f} nats test loss is so many times later than that of the waves, "
            "taken from and judged on other pairs",
            falls_later, f"of other frequencies: step {others}", above=1.5,
            holds=all(map(math.isfinite, falls_later)), judged=judged),
    ]


def divide(numbers, by):
    """Of two lists: each number over its counterpart."""
    return [number / other for number, other in zip(numbers, by, strict=True)]


def others_right_then(run):
    """The share of the other pairs that are right when those trained on are known; NaN where that
    never comes."""
    known = run["when"]["train_known"]
    if known not in run["steps"]:
        return math.nan
    return run["curves"]["test_accuracy"][run["steps"].index(known)]


def wave_claims(seeds, p, *, judged):
    """What the final models are made of; beside them the memorising and the untrained ones."""

    def final(key):
        return [run["final"][key] for run in seeds]

    def at_the_end(curve):
        return [run["curves"][curve][-1] for run in seeds]

    def before(key):
        means = []
        for moment in ("memorised", "untrained"):
            values = [run[moment][key] for run in seeds if moment in run]
            if values:
                means.append(f"{moment} {sum(values) / len(values):.2g}")
        return ", ".join(means)

    alone = min(at_the_end("restricted_others"))
    without = max(at_the_end("excluded_others"))
    return [
        claim("key frequencies: 1 % of the variance of the logits or more",
              [len(keys) for keys in final("keys")], between=(1, 8), judged=judged,
              reported="Nanda et al.: 5"),
        claim_beside("that variance in waves of a + b at these, share", final("share"),
                     f"best {N_BEST}, {before('share')}", above=0.95, judged=judged),
        claim_beside("as multiples of cos w_k(a + b - c), one number a frequency",
                     final("answer_share"), f"best {N_BEST}, {before('answer_share')}",
                     above=0.9, judged=judged),
        claim_beside("loss of these alone, all pairs, nats", at_the_end("restricted"),
                     f"of as many others at least {alone:.2g}", below=0.1, judged=judged),
        claim_beside("training loss without them, nats", at_the_end("excluded"),
                     f"without as many others {without:.2g}", above=math.log(p) / 2,
                     judged=judged),
        claim_beside("the embeddings of numbers in these frequencies, share",
                     final("embedding_share"), f"best {N_BEST}, {before('embedding_share')}",
                     above=0.7, judged=judged),
        claim_beside(f"neurons with more than {FITTED_SHARE} of their variance in one frequency",
                     final("fitted"), before("fitted"), above=0.5, judged=judged,
                     reported="Nanda et al.: 0.846"),
    ]


def control_claims(runs, *, judged):
    """That nothing generalises, and no wave stands out, where it must not."""
    claims = []
    for name, text in (("no_decay", "without weight decay"),
                       ("random_answers", "answers drawn at random")):
        if name not in runs:
            continue
        curves = runs[name]["curves"]
        claims += [
            claim_beside(f"{text}: other pairs right, the most at any step",
                         max(curves["test_accuracy"]),
                         f"training pairs {curves['train_accuracy'][-1]:.3g}",
                         below=0.1, judged=judged),
            claim(f"{text}: variance of the logits at frequencies with 1 % or more",
                  runs[name]["final"]["share"], below=0.5, judged=judged),
        ]
    return claims


def summarize_grokking(runs, p):
    """What was found, in three sentences, of the first seed's run."""
    run = seed_runs(runs)[0]
    when = run["when"]
    final = run["final"]
    return (
        "The first model knows 99 % of the pairs that it was trained on "
        f"{at_step(when['train_known'])}, and of the other pairs {at_step(when['test_known'])} "
        "(grokking.png). "
        f"On the other pairs the loss first falls below {math.log(p) / 2:.1f} nats "
        f"{at_step(when['unseen_falls'])} by the waves of a + b alone, and "
        f"{at_step(when['test_loss_falls'])} by all of the logits. "
        f"At the end {final['share']:.0%} of the logits' variance lies in waves of a + b at "
        f"{len(final['keys'])} of {len(final['shares'])} frequencies; without these the loss on "
        f"the pairs trained on is {run['curves']['excluded'][-1]:.2g} nats (a uniform guess: "
        f"{math.log(p):.1f}; frequencies.png)."
    )


def at_step(step):
    """The words for a moment of a training: "at step 52", or "at no step"."""
    return f"at step {step:,}" if math.isfinite(step) else "at no step"


def figures_of_grokking(runs, p):
    """{name: Figure}: what is known when, and what it is made of."""
    return {"grokking": loss_figure(runs, p), "frequencies": structure_figure(runs)}


def loss_figure(runs, p):
    """The accuracies of all trainings above, the losses of the first one below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    draw_accuracies(above, runs, p)
    draw_losses(below, seed_runs(runs)[0], p)
    return figure


def draw_accuracies(axes, runs, p):
    """Draws the accuracies of all trainings, the first one's thick; says how much later the
    others came."""
    seeds = seed_runs(runs)
    train, test = (seeds[0]["when"][f"{key}_known"] for key in ("train", "test"))
    late = "not to the end"
    if test < math.inf:
        late = f"at step {test}, {test / train:.0f} times as late"
    bare_axes(axes, f"Addition mod {p}: 99 % of the pairs trained on are right at step {train},\n"
              f"of the others {late}", "", "pairs answered right (share)")

    for i, run in enumerate(seeds):
        for key, name, colour in (("train", "trained on", COLOURS[0]),
                                  ("test", "others", COLOURS[1])):
            label = {0: name, 1: f"{name}, other seeds"}.get(i)
            axes.plot(run["steps"][1:], run["curves"][f"{key}_accuracy"][1:], color=colour,
                      label=label, linewidth=0.8 if i else 2)
    for name, text, dash in (("no_decay", "others, no weight decay", "--"),
                             ("random_answers", "others, random answers", ":")):
        if name in runs:
            axes.plot(runs[name]["steps"][1:], runs[name]["curves"]["test_accuracy"][1:], dash,
                      color="0.4", label=text)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_losses(axes, run, p):
    """Draws the losses of one training, whole, restricted and excluded; says which falls first."""
    names = {"train_loss": "trained on", "test_loss": "others",
             "unseen": "others, by the key frequencies alone",
             "excluded": "trained on, without the key frequencies"}
    alone, whole = run["when"]["unseen_falls"], run["when"]["test_loss_falls"]
    bare_axes(axes, f"Below {math.log(p) / 2:.1f} nats: the key frequencies alone at step {alone}, "
              f"the whole model on the others at step {whole}", "step (log scale)",
              "loss (nats, log scale)")

    for (key, name), colour in zip(names.items(), COLOURS, strict=False):
        axes.plot(run["steps"][1:], run["curves"][key][1:], color=colour, label=name)
    axes.axhline(math.log(p), color="0.55", linewidth=1, linestyle="--")
    axes.annotate("a uniform guess", (0.01, math.log(p)), xycoords=("axes fraction", "data"),
                  va="bottom", color="0.35", fontsize=9)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlim(left=8)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def structure_figure(runs):
    """Where the variance of the first model's logits lies, and how well one frequency explains each
    neuron: when all is memorised, and at the end."""
    run = seed_runs(runs)[0]
    final = run["final"]
    if "memorised" in run:
        early = run["memorised"]
        early_label = "as soon as those trained on are known"
    else:
        early = run["untrained"]
        early_label = "untrained"
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    # shares of the logits' variance
    frequencies = range(1, len(final["shares"]) + 1)
    width = 0.4
    bare_axes(left, f"{len(final['keys'])} of {len(frequencies)} frequencies have "
              f"{final['share']:.0%} of the logits' variance", "frequency k of a + b",
              "share of the variance")
    left.bar([k - width / 2 for k in frequencies], early["shares"], width, color=COLOURS[1],
             label=early_label)
    left.bar([k + width / 2 for k in frequencies], final["shares"], width, color=COLOURS[0],
             label="at the end")
    left.legend(frameon=False, fontsize=9)

    # shares of the neurons' variance
    bare_axes(right, f"{final['fitted']:.0%} of the neurons have more than {FITTED_SHARE} in one",
              "neuron, the best explained first", "share of variance in its best frequency")
    right.plot(sorted(early["fits"], reverse=True), color=COLOURS[1], label=early_label)
    right.plot(sorted(final["fits"], reverse=True), color=COLOURS[0], label="at the end")
    right.axhline(FITTED_SHARE, color="0.55", linewidth=1, linestyle="--")
    right.annotate(f"{FITTED_SHARE}", (0.99, FITTED_SHARE), xycoords=("axes fraction", "data"),
                   ha="right", va="bottom", color="0.35", fontsize=9)
    right.set_ylim(0, 1)
    return figure
