"""What is measured of a training that groks: losses and accuracies of every kept state.

The losses are those of all the logits, of some of their waves alone, and of the logits without
these waves. Beside them stands what the first and the last model are made of.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Prerequisites: experiments/grokking/model.py, experiments/grokking/fourier.py
Next: experiments/grokking/report.py
Source: Nanda et al. 2023, sections 4 and 5 (the algorithm, its progress measures)
"""

import math

import torch

from experiments.grokking.fourier import (
    answer_shares,
    excluded_logits,
    fourier_basis,
    key_frequencies,
    neuron_fits,
    restricted_logits,
    sum_shares,
    waves_of,
)
from experiments.grokking.model import states_of
from losses import cross_entropy
from utils import Progress, seeded_generator

KNOWN_ACCURACY = 0.99  # at which something is known
FITTED_SHARE = 0.85  # of a neuron's variance, at which one frequency explains it
N_BEST = 8  # frequencies that a model which has no key frequencies is measured at


def measure_losses(logits, recipe, frequencies):
    """{name: number} of one state: losses in nats, accuracies as shares.

    logits: [a, b, c]. frequencies: {suffix: list of int}; for each of them the loss by these
    waves alone ("restricted": of all pairs; "unseen": taken from and judged on pairs that were not
    trained on) and the training loss without them ("excluded").
    """
    answers = recipe.answers()
    known = recipe.trained_on()
    flat = logits.flatten(0, 1)  # [pair, c]
    right = (flat.argmax(-1) == answers).double()
    measures = {"train_loss": cross_entropy(flat[known], answers[known]).item(),
                "test_loss": cross_entropy(flat[~known], answers[~known]).item(),
                "train_accuracy": right[known].mean().item(),
                "test_accuracy": right[~known].mean().item()}

    unseen = ~known.view(logits.shape[:2])  # [a, b]
    for suffix, some in frequencies.items():
        alone = restricted_logits(logits, some).flatten(0, 1)
        alone_unseen = restricted_logits(logits, some, unseen).flatten(0, 1)[~known]
        without = excluded_logits(logits, some).flatten(0, 1)[known]
        measures["restricted" + suffix] = cross_entropy(alone, answers).item()
        measures["unseen" + suffix] = cross_entropy(alone_unseen, answers[~known]).item()
        measures["excluded" + suffix] = cross_entropy(without, answers[known]).item()
    return measures


def fit_neurons(model, recipe):
    """(shares, frequencies), a list each, as `neuron_fits`: of each neuron at "=" in the whole
    model, the largest share of its variance in one frequency, and that frequency."""
    tokens = torch.cat([recipe.pairs(), torch.full((recipe.p**2, 1), recipe.p)], 1)
    post = "blocks.0.mlp.hook_post"
    with torch.no_grad(), model.caching(post, pos_slice=-1) as cache:
        model(tokens)
    shares, frequencies = neuron_fits(cache[post].view(recipe.p, recipe.p, -1))
    return shares.tolist(), frequencies.tolist()


def describe_state(model, logits, recipe, keys):
    """What one state is made of, as plain values: shares of the logits and of the numbers'
    embeddings at the frequencies `keys`, and how the neurons are explained."""
    shares = sum_shares(logits)
    at_keys = torch.tensor(keys, dtype=torch.long) - 1
    W_E = model.W_E[:recipe.p].detach().double()
    energy_at_keys = (waves_of(keys, recipe.p) @ W_E).square().sum()
    energy = (fourier_basis(recipe.p)[1:] @ W_E).square().sum()
    fits, fit_frequencies = fit_neurons(model, recipe)
    return {
        "keys": keys,
        "shares": shares.tolist(),
        "share": shares[at_keys].sum().item(),
        "answer_share": answer_shares(logits)[at_keys].sum().item(),
        "embedding_share": (energy_at_keys / energy).item(),
        "fits": fits,
        "fit_frequencies": fit_frequencies,
        "fitted": sum(fit > FITTED_SHARE for fit in fits) / len(fits),
    }


def first_step(steps, values, holds):
    """The first step at which a value is as wanted; infinity where none is."""
    return next((step for step, value in zip(steps, values, strict=True) if holds(value)), math.inf)


def measure_training(recipe, history, label):
    """All that is said about one training, as plain values.

    history: as `train_to_add` returns it. label: what the progress line begins with.
    Returns {"steps", "curves": {measure: [step]}, "when": {what was reached: step}, "final": what
    the last model is made of}, and beside it "untrained" and "memorised" (the first state that
    knows what it was trained on, where there is one), each at the frequencies that it has most of.
    """
    # the last state says which frequencies are key; as many others are drawn, for a null
    *_, (_, model, logits) = states_of(recipe, history)
    keys = key_frequencies(sum_shares(logits))
    final = describe_state(model, logits, recipe, keys)
    others = [k for k in range(1, (recipe.p + 1) // 2) if k not in keys]
    order = torch.randperm(len(others), generator=seeded_generator(recipe.seed)).tolist()
    frequencies = {"": keys, "_others": [others[i] for i in order[:len(keys)]]}

    # every state, from the first one on
    steps = history["steps"]
    rows = []
    early = {}
    progress = Progress(len(steps), " states")
    for step, model, logits in states_of(recipe, history):
        rows.append(measure_losses(logits, recipe, frequencies))
        moment = None
        if step == 0:
            moment = "untrained"
        elif "memorised" not in early and rows[-1]["train_accuracy"] >= KNOWN_ACCURACY:
            moment = "memorised"
        if moment:
            most_used = key_frequencies(sum_shares(logits), least=0)[:N_BEST]
            early[moment] = describe_state(model, logits, recipe, most_used)
        progress.show(len(rows), f"{label} measured")

    # when what was reached
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    half_way = math.log(recipe.p) / 2
    when = {f"{name}_known": first_step(steps, curves[f"{name}_accuracy"],
                                        lambda share: share >= KNOWN_ACCURACY)
            for name in ("train", "test")}
    when |= {f"{name}_falls": first_step(steps, curves[name], lambda loss: loss < half_way)
             for name in ("unseen", "unseen_others", "test_loss")}
    return {"steps": steps, "curves": curves, "when": when, "final": final, **early}
