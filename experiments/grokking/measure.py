"""Measure a model that groks: losses, accuracies and structure at every kept step.

The losses are those of all logits, of some of their waves alone, and of the logits without these
waves. The structure is measured for the first model, the memorising one and the last one.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: experiments/grokking/model.py, experiments/grokking/fourier.py
Next: experiments/grokking_experiment.py
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

KNOWN_ACCURACY = 0.99  # the accuracy at which pairs count as known
FITTED_SHARE = 0.85  # a frequency with more of a neuron's variance explains the neuron
N_BEST = 8  # frequencies at which a model without key frequencies is measured


def measure_losses(logits, recipe, frequencies):
    """{name: number} of one state: losses in nats, accuracies as shares.

    logits: [a, b, c]. frequencies: {suffix: list of int}. For each list, the loss of these waves
    alone ("restricted": on all pairs; "unseen": found and judged on pairs outside of the training
    set) and the training loss without them ("excluded").
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
    """(shares, frequencies), two lists as from `neuron_fits`: for each neuron at "=", the largest
    share of its variance in one frequency, and that frequency."""
    tokens = torch.cat([recipe.pairs(), torch.full((recipe.p**2, 1), recipe.p)], 1)
    post = "blocks.0.mlp.hook_post"
    with torch.no_grad(), model.caching(post, pos_slice=-1) as cache:
        model(tokens)
    shares, frequencies = neuron_fits(cache[post].view(recipe.p, recipe.p, -1))
    return shares.tolist(), frequencies.tolist()


def describe_state(model, logits, recipe, keys):
    """The structure of one state, as plain values: the shares of the logits and of the number
    embeddings at the frequencies `keys`, and how well one frequency explains each neuron."""
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
    """The first step at which holds(value) is true; infinity if it never is."""
    return next((step for step, value in zip(steps, values, strict=True) if holds(value)), math.inf)


def measure_training(recipe, history, label):
    """All measurements of one run, as plain values.

    history: what `train_to_add` returned. label: the run's name in the progress line.
    Returns {"steps", "curves": {measure: [step]}, "when": {moment: step}, "final": the structure of
    the last model}, and also "untrained" and "memorised" (the first state that knows the training
    pairs, if there is one), each measured at its own largest frequencies.
    """
    # the last state defines the key frequencies; as many others are drawn as a control
    *_, (_, model, logits) = states_of(recipe, history)
    keys = key_frequencies(sum_shares(logits))
    final = describe_state(model, logits, recipe, keys)
    others = [k for k in range(1, (recipe.p + 1) // 2) if k not in keys]
    order = torch.randperm(len(others), generator=seeded_generator(recipe.seed)).tolist()
    frequencies = {"": keys, "_others": [others[i] for i in order[:len(keys)]],
                   "_all": list(range(1, (recipe.p + 1) // 2))}  # all: the mean over equal sums

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

    # when each moment was reached
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    half_way = math.log(recipe.p) / 2
    when = {f"{name}_known": first_step(steps, curves[f"{name}_accuracy"],
                                        lambda share: share >= KNOWN_ACCURACY)
            for name in ("train", "test")}
    when |= {f"{name}_falls": first_step(steps, curves[name], lambda loss: loss < half_way)
             for name in ("unseen", "unseen_others", "unseen_all", "test_loss")}
    return {"steps": steps, "curves": curves, "when": when, "final": final, **early}
