"""Measure the importance of heads in four ways, and test it: by pruning, in pairs, and against a
known circuit.

Heads are ranked on some texts and pruned on others. Every effect is a rise of the loss, in nats per
token. A pruned head writes its mean, which could be merged into a bias. Intervals are over texts.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: head_ablation.py, experiments/importance/model.py
Next: experiments/importance/report.py
Source: Michel et al. 2019 (gradient importance, pruning curves); McDougall et al. 2023 (repair)
"""

import copy
import itertools

import torch
import torch.nn.functional as F

from activation_cache import get_act_name
from head_ablation import (
    ablation_effects,
    derangement,
    head_importance,
    head_slopes,
    pairwise_interaction,
    self_repair,
)
from metrics import auroc, permutation_pvalue, spearman
from model import GPT
from utils import seeded_generator

ABLATIONS = ("zero", "mean", "resample")
METHODS = (*ABLATIONS, "gradient")
STEPS = 8  # on the path from a head's z to 0
DRAWS = 1000  # of texts, for an interval; of heads, for a null
PARTS = ("total", "direct", "by_rest", "by_patterns", "by_scale")  # the fields of SelfRepair


def measure_subject(subject, n_orders):
    """All measurements of an ImportanceSubject, a dict of plain values.

    n_orders: the number of random orders of pruning.
    """
    n_layers = subject.model.cfg.n_layers
    effects = head_effects(subject).double()
    scores = importance_scores(effects, equal_weights(effects), n_layers)
    draws = importance_scores(effects, bootstrap_weights(effects.shape[2]), n_layers)
    low, high = central_interval(draws)

    how = {"mode": "mean", "reference": cache_z(subject.model, subject.tokens)}
    result = {"name": subject.name, "heads": subject.heads, "importance": scores.tolist(),
              "low": low, "high": high, "slope": effects[3].mean(-1).tolist(),
              "agreement": rank_agreement(scores, draws),
              "pruning": measure_pruning(subject, scores, n_orders, how)}
    result |= measure_pairs_and_repair(subject, how)
    if subject.truth:
        result |= compare_with_truth(subject, scores, how)
    return result


# The four measures


def head_effects(subject, model=None):
    """The effect of each head by each method on each text, [method, head, batch].

    model: the model to measure on the subject's texts; None is the subject's own.
    """
    model = model or subject.model
    tokens, metric = subject.tokens, subject.metrics[0]
    source = derangement(len(tokens), seeded_generator(0))
    effects = [head_importance(model, tokens, metric, mode=mode, source=source,
                               reference=cache_z(model, tokens)).values for mode in ABLATIONS]
    slopes = head_slopes(model, tokens, metric).values.abs()
    return torch.stack([*effects, slopes]).flatten(1, 2)


@torch.no_grad()
def cache_z(model, tokens):
    """An ActivationCache of every head's z on these texts."""
    return model.run_with_cache(tokens, lambda name: name.endswith("hook_z"))[1]


def importance_scores(effects, weights, n_layers):
    """The weighted mean over texts of effects [method, head, batch]; returns [..., method, head].

    weights: [..., batch], one for each text. As in the paper, the gradient's scores are scaled to
    length 1 in each layer.
    """
    means = torch.einsum("...b,mhb->...mh", weights, effects)
    by_layer = means[..., 3, :].unflatten(-1, (n_layers, -1))
    means[..., 3, :] = F.normalize(by_layer, dim=-1).flatten(-2)
    return means


def equal_weights(effects):
    """The same weight for each text, [batch]."""
    n_texts = effects.shape[-1]
    return torch.full((n_texts,), 1 / n_texts).to(effects)


def bootstrap_weights(n_texts, seed=0):
    """Weights [draw, text] of texts drawn with replacement, as in `bootstrap_ci`."""
    draws = torch.randint(n_texts, (DRAWS, n_texts), generator=seeded_generator(seed))
    return F.one_hot(draws, n_texts).double().mean(1)


def central_interval(draws):
    """(low, high), two lists: the interval that holds the middle 95 % of draws [draw, ...]."""
    return [draws.quantile(q, dim=0).tolist() for q in (0.025, 0.975)]


def gradient_along_path(subject):
    """The gradient importance of each head, [head], averaged along the path from z to 0.

    The slope is taken in the middle of each of STEPS parts of the path: even if it is flat at z, it
    need not be flat there. A text's mean over the path equals its cost by zero ablation. The sign
    is dropped, as it is for the gradient at z.
    """
    means = []
    for layer, head in subject.heads:
        slopes = []
        for part in range(STEPS):
            share = (part + 0.5) / STEPS
            with subject.model.hooks([(get_act_name("z", layer), scale_head(head, share))]):
                here = head_slopes(subject.model, subject.tokens, subject.metrics[0]).values
            slopes.append(here[layer, head] / share)
        means.append(torch.stack(slopes).mean(0).abs().mean())
    return torch.stack(means)


def scale_head(head, share):
    """A hook that scales one head's z by `share`."""
    def scale(z, hook):
        is_head = torch.arange(z.shape[2]) == head
        return torch.where(is_head[:, None], share * z, z)

    return scale


# Do the methods agree?


def rank_agreement(scores, draws):
    """How similarly the methods rank the heads: a dict.

    scores: [method, head]; draws: [draw, method, head], the same for redrawn texts. Returns pairs:
    {"zero, mean": [Spearman, low, high]}; mean: their mean; null_high: the 95 % quantile of that
    mean for shuffled heads; p: its p-value.
    """
    n_methods, n_heads = scores.shape
    pairs = list(itertools.combinations(range(n_methods), 2))
    names = [", ".join(pair) for pair in itertools.combinations(METHODS, 2)]

    def pair_correlations(some):
        return torch.stack([spearman(some[..., i, :], some[..., j, :]) for i, j in pairs], -1)

    order = torch.rand(DRAWS, *scores.shape, generator=seeded_generator(1)).argsort(-1)
    shuffled = scores.expand(DRAWS, -1, n_heads).gather(-1, order)
    null = pair_correlations(shuffled).mean(-1)

    own = pair_correlations(scores)
    low, high = central_interval(pair_correlations(draws))
    return {"pairs": dict(zip(names, zip(own.tolist(), low, high, strict=True), strict=True)),
            "mean": own.mean().item(), "null_high": null.quantile(0.95).item(),
            "p": permutation_pvalue(own.mean(), null).item()}


# Pruning


def measure_pruning(subject, scores, n_orders, how):
    """Prune heads by each method and in random orders; returns a dict.

    curves, random: {method: curve} and a list of curves, as `pruning_curves` returns them. areas,
    random_areas: the mean rise over the first half of each curve, in nats. p: {method: how often a
    random order does as well}. scores: [method, head]; how: as in `pruning_curves`.
    """
    n_heads = len(subject.heads)
    generator = seeded_generator(2)
    orders = [row.argsort().tolist() for row in scores]
    orders += [torch.randperm(n_heads, generator=generator).tolist() for _ in range(n_orders)]
    curves = pruning_curves(subject, orders, how)

    areas = torch.tensor(curves)[:, 1 : n_heads // 2 + 1].mean(1)
    own, null = areas[: len(METHODS)], areas[len(METHODS) :]
    return {"curves": dict(zip(METHODS, curves, strict=False)), "random": curves[len(METHODS) :],
            "areas": dict(zip(METHODS, own.tolist(), strict=True)), "random_areas": null.tolist(),
            "p": {method: permutation_pvalue(-area, -null).item()
                  for method, area in zip(METHODS, own, strict=True)}}


def pruning_curves(subject, orders, how):
    """The rise of the loss on held-out texts without the first n heads of each order.

    Returns a list for each order, with n = 0 to all heads. orders: lists of head numbers. how: the
    arguments of `ablation_effects` that say what replaces a head. Equal sets of heads are measured
    once.
    """
    sets = [[tuple(sorted(order[:n])) for n in range(len(order) + 1)] for order in orders]
    distinct = list(dict.fromkeys(itertools.chain(*sets)))
    chosen = [[subject.heads[head] for head in numbers] for numbers in distinct]
    rises = ablation_effects(subject.model, subject.held, chosen, subject.metrics[1], **how).mean
    rise_of = dict(zip(distinct, rises.tolist(), strict=True))
    return [[rise_of[numbers] for numbers in row] for row in sets]


# How heads work together


def measure_pairs_and_repair(subject, how):
    """How heads work together: a dict of means over the held-out texts, in nats.

    alone: each head's effect. pairs: the effect of removing two heads minus the two single effects,
    [head][head]. repair: {part: [for each head]}, the parts of its effect (see `SelfRepair`).
    """
    model, held, metric = subject.model, subject.held, subject.metrics[1]
    pairs = pairwise_interaction(model, held, subject.heads, metric, **how).mean
    repair = [self_repair(model, held, head, metric, **how) for head in subject.heads]
    return {"alone": (-pairs.diagonal()).tolist(), "pairs": pairs.tolist(),
            "repair": {part: [getattr(one, part).mean().item() for one in repair]
                       for part in PARTS}}


# Comparison with a known circuit


def compare_with_truth(subject, scores, how):
    """How well the methods separate the circuit's heads from those outside of it: a dict.

    auroc: for each method. auroc_untrained: the same for an untrained model. auroc_planted: the
    same for a copy of the model with a planted dead head; dead: the largest score of that head by
    any method on any text. auroc_along: for the gradient along the path to 0. truth: whether each
    head is in the circuit. outside: the heads that are neither in the circuit nor spares. (Spares
    look where the circuit's last head looks, and are left out.) lead, lead_untrained: what
    `circuit_lead` returns, for the model and for the untrained one. Also what `measure_outside`
    returns.
    """
    outside = [head for head in subject.heads if head not in subject.truth + subject.spares]
    is_true = torch.tensor([head in subject.truth for head in subject.heads])
    counts = torch.tensor([head not in subject.spares for head in subject.heads])

    def aurocs(rows):
        return [auroc(row[counts], is_true[counts]) for row in rows]

    fresh = GPT(subject.model.cfg, seed=0).eval()
    untrained = head_effects(subject, fresh).mean(-1)

    # A head outside of the circuit is made dead: with W_O = 0 it writes nothing.
    layer, head = outside[0]
    planted = copy.deepcopy(subject.model)
    with torch.no_grad():
        planted.blocks[layer].attn.W_O[head] = 0.0
    effects = head_effects(subject, planted)
    planted_scores = importance_scores(effects, equal_weights(effects), subject.model.cfg.n_layers)
    dead = effects[:, subject.heads.index(outside[0])].abs().max().item()

    result = {"truth": is_true.tolist(), "outside": outside, "dead": dead,
              "lead": circuit_lead(subject, subject.model, outside),
              "lead_untrained": circuit_lead(subject, fresh, outside),
              "auroc": aurocs(scores), "auroc_planted": aurocs(planted_scores),
              "auroc_untrained": aurocs(untrained),
              "auroc_along": aurocs([gradient_along_path(subject)])[0]}
    return result | measure_outside(subject, outside, how)


def circuit_lead(subject, model, outside):
    """How much more the cheaper part of the circuit costs than the costliest head outside of it:
    a list, in nats for each of ABLATIONS.

    The parts are the previous-token head, and all heads that look where the induction head looks,
    removed together: removed alone, a head with a spare costs little, because the spare takes over.
    """
    previous, induction = subject.truth
    parts = [[previous], [induction, *subject.spares]]
    sets = parts + [[head] for head in outside]
    source = derangement(len(subject.tokens), seeded_generator(0))
    reference = cache_z(model, subject.tokens)

    leads = []
    for mode in ABLATIONS:
        costs = ablation_effects(model, subject.tokens, sets, subject.metrics[0], mode=mode,
                                 source=source, reference=reference).mean
        leads.append((costs[:2].min() - costs[2:].max()).item())
    return leads


def measure_outside(subject, outside, how):
    """The cost of removing all heads outside of the circuit: a dict.

    previous, induction, spare: the numbers of the circuit's two heads and of its first spare (None
    if there is none). outside_cost: the cost of removing all heads outside together, in nats.
    other_costs: the cost of each other set of as many heads.
    """
    heads = subject.heads
    previous, induction = subject.truth
    others = [list(some) for some in itertools.combinations(heads, len(outside))
              if list(some) != outside]
    costs = ablation_effects(subject.model, subject.held, [outside, *others], subject.metrics[1],
                             **how).mean
    return {"previous": heads.index(previous), "induction": heads.index(induction),
            "spare": heads.index(subject.spares[0]) if subject.spares else None,
            "outside_cost": costs[0].item(), "other_costs": costs[1:].tolist()}
