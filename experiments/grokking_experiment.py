"""Grokking: a transformer learns addition mod p by heart, and long after it how to add.

    python experiments/grokking_experiment.py              # 3 seeds, 2 controls: 2 to 4 minutes
    python experiments/grokking_experiment.py --canonical  # Nanda et al.'s p = 113: 2 minutes

Claim: on pairs that it was not trained on the model is right only long after it is right on all the
others; what it does then is a sum of cos w_k(a + b - c) at few frequencies k, without which it does
not even know what it was trained on; and that sum grows long before the test loss shows it.
Expected: every line passes and the exit code is 0. Without weight decay, and where the answers are
drawn at random, nothing is ever right on other pairs.

The model is a GPT of one layer without LayerNorm, with ReLU, trained on all of its pairs at each
step, with weight decay 1. By default p = 59, and (a, b) is trained on with (b, a) or not at all, so
that a + b = b + a is no help. With --canonical p = 113, d_model 128 and three tenths of all pairs,
as in the paper, at seven times its learning rate, for one seed and without the controls. One
thread; 25 s of CPU time a training (p = 113: 108 s), and 15 MB (60 MB) on the disk.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Read before: experiments/grokking_fourier.py; after: optim.py (weight decay)
Source: Power et al. 2022; Nanda et al. 2023, *Progress measures for grokking*
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import asdict

import torch
from matplotlib.figure import Figure

from experiments.common import load_or_make, over_seeds, perform
from experiments.grokking_fourier import (
    answer_shares,
    excluded,
    fourier_basis,
    key_frequencies,
    neuron_fits,
    restricted,
    sum_shares,
    waves_of,
)
from experiments.grokking_training import GrokkingConfig, history_of, trained
from losses import cross_entropy
from plotting import COLOURS, bare_axes
from utils import Progress, run_program, seeded_generator

KNOWN = 0.99  # the accuracy at which something is known
FITTED = 0.85  # the share of a neuron's variance at which one frequency explains it
POST = "blocks.0.mlp.hook_post"

def neurons(model, recipe):
    """(share, frequency) for each neuron at "=", as `neuron_fits`: what the whole model has there.
    Returns two lists."""
    tokens = torch.cat([recipe.pairs(), torch.full((recipe.p**2, 1), recipe.p)], 1)
    with torch.no_grad(), model.caching(POST, pos_slice=-1) as cache:
        model(tokens)
    shares, which = neuron_fits(cache[POST].view(recipe.p, recipe.p, -1))
    return shares.tolist(), which.tolist()


def losses_of(logits, recipe, frequencies):
    """{name: number} of one state: losses in nats, accuracies as shares.

    logits: [a, b, c]. frequencies: {suffix: list of int}, for restricted and excluded losses.
    """
    answers, known = recipe.answers(), recipe.trained_on()
    flat = logits.flatten(0, 1)
    right = (flat.argmax(-1) == answers).double()
    found = {"train_loss": cross_entropy(flat[known], answers[known]).item(),
             "test_loss": cross_entropy(flat[~known], answers[~known]).item(),
             "train_accuracy": right[known].mean().item(),
             "test_accuracy": right[~known].mean().item()}
    for suffix, some in frequencies.items():
        kept_part = restricted(logits, some).flatten(0, 1)
        rest = excluded(logits, some).flatten(0, 1)[known]
        unseen = restricted(logits, some, ~known.view(logits.shape[:2])).flatten(0, 1)[~known]
        found["restricted" + suffix] = cross_entropy(kept_part, answers).item()
        found["unseen" + suffix] = cross_entropy(unseen, answers[~known]).item()
        found["excluded" + suffix] = cross_entropy(rest, answers[known]).item()
    return found


def portrait(model, logits, recipe, keys):
    """What one state is made of, as plain values: shares of the logits and of the numbers'
    embeddings at the frequencies `keys`, and how the neurons are explained."""
    shares, at_keys = sum_shares(logits), torch.tensor(keys, dtype=torch.long) - 1
    W_E = model.W_E[:recipe.p].detach().double()
    waves = (waves_of(keys, recipe.p) @ W_E).square().sum()
    everything = (fourier_basis(recipe.p)[1:] @ W_E).square().sum()
    fits, which = neurons(model, recipe)
    return {"keys": keys, "shares": shares.tolist(), "share": shares[at_keys].sum().item(),
            "answer_share": answer_shares(logits)[at_keys].sum().item(),
            "embedding_share": (waves / everything).item(),
            "fits": fits, "fit_frequencies": which,
            "fitted": sum(fit > FITTED for fit in fits) / len(fits)}


def first(steps, values, holds):
    """The first step at which a value is as wanted; infinity where none is."""
    return next((step for step, value in zip(steps, values, strict=True) if holds(value)), math.inf)


def measured(recipe, state, name):
    """All that is said about one training, as plain values: its curves, when what was reached, and
    what the final model is made of; the untrained and the memorising one, at their best 8."""
    *_, (_, model, logits) = history_of(recipe, state)
    keys = key_frequencies(sum_shares(logits))
    final = portrait(model, logits, recipe, keys)
    others = [k for k in range(1, (recipe.p + 1) // 2) if k not in keys]
    order = torch.randperm(len(others), generator=seeded_generator(recipe.seed)).tolist()
    frequencies = {"": keys, "_others": [others[i] for i in order[:len(keys)]]}
    steps, rows, early = state["history"]["steps"], [], {}
    progress = Progress(len(steps), " states")
    for step, model, logits in history_of(recipe, state):
        rows.append(losses_of(logits, recipe, frequencies))
        moment = ("untrained" if step == 0 else "memorised" if "memorised" not in early
                  and rows[-1]["train_accuracy"] >= KNOWN else None)
        if moment:
            best = key_frequencies(sum_shares(logits), least=0)[:8]
            early[moment] = portrait(model, logits, recipe, best)
        progress.show(len(rows), f"{name} measured")
    curves = {key: [row[key] for row in rows] for key in rows[0]}
    low = math.log(recipe.p) / 2
    when = {f"{key}_known": first(steps, curves[f"{key}_accuracy"], lambda share: share >= KNOWN)
            for key in ("train", "test")}
    when |= {f"{key}_falls": first(steps, curves[key], lambda loss: loss < low)
             for key in ("unseen", "unseen_others", "test_loss")}
    return {"steps": steps, "curves": curves, "when": when, "final": final, **early}


def over(seeds, judged):
    """A function that makes the Claim that value(run) is as wanted in each of the runs `seeds`;
    not judged, it makes lines for information."""

    def claim(text, value, holds=None, **more):
        return over_seeds(text, [value(run) for run in seeds], holds if judged else None, **more)

    return claim


def claims_on_time(claim, seeds, p, symmetric):
    """What is reached when. claim: what `over` returns; symmetric: (a, b) was on the side of
    (b, a)."""
    low = math.log(p) / 2
    others = ", ".join(f"{run['when']['unseen_others_falls']:.4g}" for run in seeds)

    def known_then(run):
        then = run["when"]["train_known"]
        return run["curves"]["test_accuracy"][run["steps"].index(then)] if then in run["steps"] \
            else math.nan

    return [
        claim("step at which 99 % of the training pairs are right",
              lambda run: run["when"]["train_known"]),
        claim("other pairs right at that step, share", known_then,
              (lambda right: right < 0.05) if symmetric else None, control=f"chance {1 / p:.2g}",
              mark=0.05),
        claim("99 % of the others are right so many times later",
              lambda run: run["when"]["test_known"] / run["when"]["train_known"],
              lambda ratio: 5 <= ratio < math.inf, reported="Nanda et al.: 6.7 to 10",
              control="at least 5", mark=5.0),
        claim(f"below {low:.2f} nats test loss is so many times later than that of the waves, "
              "taken from and judged on other pairs",
              lambda run: run["when"]["test_loss_falls"] / run["when"]["unseen_falls"],
              lambda ratio: 1.5 <= ratio < math.inf, mark=1.5,
              control=f"at least 1.5; of other frequencies: step {others}")]


def claims_on_waves(claim, seeds, p):
    """What the final models are made of; beside them the memorising and the untrained ones."""

    def final(key):
        return lambda run: run["final"][key]

    def at_the_end(key):
        return lambda run: run["curves"][key][-1]

    def before(key):
        found = {moment: [run[moment][key] for run in seeds if moment in run]
                 for moment in ("memorised", "untrained")}
        return "best 8, " + ", ".join(f"{moment} {sum(values) / len(values):.2g}"
                                      for moment, values in found.items() if values)

    without = max(run["curves"]["excluded_others"][-1] for run in seeds)
    alone = min(run["curves"]["restricted_others"][-1] for run in seeds)
    return [
        claim("key frequencies: 1 % of the variance of the logits or more",
              lambda run: len(run["final"]["keys"]), lambda n: 1 <= n <= 8,
              reported="Nanda et al.: 5", control="at most 8", mark=8.0),
        claim("that variance in waves of a + b at these, share", final("share"),
              lambda share: share >= 0.95, control=before("share"), mark=0.95),
        claim("as multiples of cos w_k(a + b - c), one number a frequency", final("answer_share"),
              lambda share: share >= 0.9, control=before("answer_share")),
        claim("loss of these alone, all pairs, nats", at_the_end("restricted"),
              lambda nats: nats < 0.1, control=f"of as many others at least {alone:.2g}"),
        claim("training loss without them, nats", at_the_end("excluded"),
              lambda nats: nats > math.log(p) / 2,
              control=f"without as many others {without:.2g}"),
        claim("the embeddings of numbers in these frequencies, share", final("embedding_share"),
              lambda share: share >= 0.7, control=before("embedding_share")),
        claim(f"neurons with more than {FITTED} of their variance in one frequency",
              final("fitted"), lambda share: share > 0.5, reported="Nanda et al.: 0.846",
              control=before("fitted").removeprefix("best 8, "))]


def claims_of_controls(runs, judged):
    """That nothing generalises, and no wave stands out, where it must not."""
    lines = []
    for name, text, most in (("no_decay", "without weight decay", 0.1),
                             ("random_answers", "answers drawn at random", 0.1)):
        if name not in runs:
            continue
        claim, curves = over([runs[name]], judged), runs[name]["curves"]
        lines += [
            claim(f"{text}: other pairs right, the most at any step",
                  lambda run: max(run["curves"]["test_accuracy"]),
                  lambda right, most=most: right < most, mark=most,
                  control=f"at most {most:g}; training pairs {curves['train_accuracy'][-1]:.3g}"),
            claim(f"{text}: variance of the logits at frequencies with 1 % or more",
                  lambda run: run["final"]["share"], lambda share: share < 0.5, mark=0.5,
                  control="at most 0.5")]
    return lines


def accuracy_panel(axes, runs, p):
    """Draws the accuracies of all trainings, the first one's thick; says how much later the
    others came."""
    seeds = [run for name, run in runs.items() if "seed_" in name]
    train, test = (seeds[0]["when"][f"{key}_known"] for key in ("train", "test"))
    late = (f"at step {test}, {test / train:.0f} times as late" if test < math.inf
            else "not to the end")
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


def loss_panel(axes, run, p):
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


def loss_figure(runs, p):
    """The accuracies of all trainings above, the losses of the first one below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    accuracy_panel(above, runs, p)
    loss_panel(below, runs[min(runs, key=lambda name: "seed_" not in name)], p)
    return figure


def structure_figure(runs):
    """Where the variance of the first model's logits lies, and how well one frequency explains each
    neuron: when all is memorised, and at the end."""
    run = runs[min(runs, key=lambda name: "seed_" not in name)]
    final, early = run["final"], run.get("memorised", run["untrained"])
    began = "as soon as those trained on are known" if "memorised" in run else "untrained"
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    K, half = range(1, len(final["shares"]) + 1), 0.4
    bare_axes(left, f"{len(final['keys'])} of {len(K)} frequencies have {final['share']:.0%} of the"
              " logits' variance", "frequency k of a + b", "share of the variance")
    left.bar([k - half / 2 for k in K], early["shares"], half, color=COLOURS[1],
             label=began)
    left.bar([k + half / 2 for k in K], final["shares"], half, color=COLOURS[0],
             label="at the end")
    left.legend(frameon=False, fontsize=9)
    bare_axes(right, f"{final['fitted']:.0%} of the neurons have more than {FITTED} in one",
              "neuron, the best explained first", "share of variance in its best frequency")
    lines = {began: early, "at the end": final}
    for (name, portrait), colour in zip(lines.items(), (COLOURS[1], COLOURS[0]), strict=True):
        right.plot(sorted(portrait["fits"], reverse=True), color=colour, label=name)
    right.axhline(FITTED, color="0.55", linewidth=1, linestyle="--")
    right.annotate(f"{FITTED}", (0.99, FITTED), xycoords=("axes fraction", "data"), ha="right",
                   va="bottom", color="0.35", fontsize=9)
    right.set_ylim(0, 1)
    return figure


def run(cfg, folder):
    """{"claims": [Claim], "runs": {name: what `measured` returns}, "p"}. cfg: a GrokkingConfig."""
    runs = {}
    for name, recipe in cfg.recipes().items():
        state = load_or_make(folder / name / "checkpoint.pt", asdict(recipe),
                     lambda recipe=recipe, name=name: trained(recipe, name), cfg.retrain)
        runs[name] = measured(recipe, state, name)
    seeds = [each for name, each in runs.items() if "seed_" in name]
    claim, judged = over(seeds, not cfg.quick), not cfg.quick
    claims = [*claims_on_time(claim, seeds, recipe.p, recipe.symmetric),
              *claims_on_waves(claim, seeds, recipe.p), *claims_of_controls(runs, judged)]
    return {"claims": claims, "runs": runs, "p": recipe.p}


def figures(result):
    """{name: Figure} of what `run` returns."""
    return {"grokking": loss_figure(result["runs"], result["p"]),
            "frequencies": structure_figure(result["runs"])}


def main(argv=None):
    """The program: trains, measures, prints the table; a miss exits with 1."""
    perform(GrokkingConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
