"""How much does a head matter? Four measures, a model whose circuit is known, and one of a text.

    python experiments/head_importance.py                    # 2 minutes, one thread
    python experiments/head_importance.py --run_name mine    # a run of train.py in outputs/
    python experiments/head_importance.py --quick            # seconds: one seed, few steps

Claim: zero, mean and resample ablation and the gradient importance of Michel et al. 2019 rank the
heads of a model of text much alike, and pruning by any of the three ablations costs less than
pruning in a random order. By the gradient it does too for Shakespeare, but not for the built-in
corpus, so that is reported and not claimed. Where the circuit is known (two layers, an induction
circuit) all ablations put its heads on top, and all four give a dead head exactly 0. The gradient
is flat at a loss near 0, and finds the circuit by luck; its mean along the way to z = 0 finds it.
And a number for each head hides how heads work together: the previous-token head and an induction
head are in series, so that removing both costs no more than one; two induction heads are in
parallel, so that both cost more than the two numbers add up to.
Expected: every line with a verdict passes, on Tiny Shakespeare and on the built-in corpus (without
a network). The induction models are those of experiments/induction_head_detection, made here (a
minute more) where they are not there yet.

Heads are ranked on some texts, and pruned on others. A pruned head writes its mean, which could be
a bias. Intervals are over texts, those of a claim over seeds.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Read before: head_ablation.py, experiments/importance_models.py
Source: Michel et al. 2019 (gradient importance, pruning curves); McDougall et al. 2023 (repair)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from activation_cache import get_act_name
from config import check_choices, check_field, option
from experiments.common import ExperimentConfig, perform
from experiments.importance_claims import ABLATIONS, METHODS, claims_of, figures
from experiments.importance_models import subjects
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
from utils import Progress, run_program, seeded_generator

STEPS = 8  # from a head's z to 0
DRAWS = 1000  # of texts, for an interval; of heads, for a null
PARTS = ("total", "direct", "by_rest", "by_patterns", "by_scale")


@dataclass(frozen=True)
class ImportanceConfig(ExperimentConfig):
    """What is measured, and on how much."""

    run_name: str | None = option(None, "a run of train.py, in place of models made here")
    dataset: Literal["auto", "tiny_shakespeare", "builtin"] = option(
        "auto", "the text of the models made here, as for train.py")
    steps: int = option(500, "steps of training for each model of text")
    windows: int = option(64, "texts to rank the heads on; a quarter as many to prune on")
    orders: int = option(40, "random orders of pruning")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        check_field(self, "windows", lambda n: n >= 8, "8 or more")
        check_field(self, "orders", lambda n: n >= 20, "20 or more")


# What is measured


def effects(subject, model=None):
    """What each method says of each head on each text, [method, head, batch], before any mean."""
    model, tokens, metric = model or subject.model, subject.tokens, subject.metrics[0]
    source = derangement(len(tokens), seeded_generator(0))
    found = [head_importance(model, tokens, metric, mode=mode, reference=z_of(model, tokens),
                             source=source).values for mode in ABLATIONS]
    slopes = head_slopes(model, tokens, metric).values.abs()
    return torch.stack([*found, slopes]).flatten(1, 2)


def along_the_way(subject):
    """What the gradient says of each head, [head], taken not at its z alone but in the middle of
    each of STEPS parts of the way to 0: where the slope is flat here, it need not be there. A
    text's mean over the way is what zero ablation costs it; the sign is dropped as at the start."""
    found = []
    for layer, head in subject.heads:
        slopes = []
        for share in ((part + 0.5) / STEPS for part in range(STEPS)):
            with subject.model.hooks([(get_act_name("z", layer), shrunk(head, share))]):
                here = head_slopes(subject.model, subject.tokens, subject.metrics[0]).values
            slopes.append(here[layer, head] / share)
        found.append(torch.stack(slopes).mean(0).abs().mean())
    return torch.stack(found)


def shrunk(head, share):
    """A hook that leaves a share of what one head has found."""
    def shrink(z, hook):
        here = torch.arange(z.shape[2]) == head
        return torch.where(here[:, None], share * z, z)

    return shrink


@torch.no_grad()
def z_of(model, tokens):
    """The cache of what the heads write on these texts."""
    return model.run_with_cache(tokens, lambda name: name.endswith("hook_z"))[1]


def importance(found, weights, n_layers):
    """Of the effects found [method, head, batch], the mean over texts [..., method, head]; the
    gradient's has length 1 in each layer, as in the paper. weights [..., batch]: of texts."""
    means = torch.einsum("...b,mhb->...mh", weights, found)
    layers = means[..., 3, :].unflatten(-1, (n_layers, -1))
    means[..., 3, :] = F.normalize(layers, dim=-1).flatten(-2)
    return means


def redrawn(n_texts, seed=0):
    """Weights [draw, text] of texts that are drawn again and again, as in `bootstrap_ci`."""
    draws = torch.randint(n_texts, (DRAWS, n_texts), generator=seeded_generator(seed))
    return F.one_hot(draws, n_texts).double().mean(1)


def middle(draws):
    """(low, high) between which the middle 95 % of the draws lie: [draw, ...] -> lists."""
    return [draws.quantile(q, dim=0).tolist() for q in (0.025, 0.975)]


def agreement(point, draws):
    """How much alike the methods rank the heads: a dict. point [method, head], draws [draw, ...].

    pairs: {"zero, mean": [Spearman, low, high]}. mean: over the pairs, with null_high, what 95 % of
    shuffled heads stay below, and its p-value.
    """
    def rhos(scores):
        return torch.stack([spearman(scores[..., i, :], scores[..., j, :])
                            for i, j in itertools.combinations(range(len(METHODS)), 2)], -1)

    n_heads, generator = point.shape[1], seeded_generator(1)
    order = torch.rand(DRAWS, *point.shape, generator=generator).argsort(-1)
    null = rhos(point.expand(DRAWS, -1, n_heads).gather(-1, order)).mean(-1)
    own, names = rhos(point), [", ".join(pair) for pair in itertools.combinations(METHODS, 2)]
    low, high = middle(rhos(draws))
    return {"pairs": dict(zip(names, zip(own.tolist(), low, high, strict=True), strict=True)),
            "mean": own.mean().item(), "null_high": null.quantile(0.95).item(),
            "p": permutation_pvalue(own.mean(), null).item()}


def pruned(subject, orders, how):
    """The rise of the held texts' loss with the first n heads of each order removed, as a list for
    n = 0 to all. orders: lists of numbers of heads. Equal sets of heads are measured once."""
    sets = [[tuple(sorted(order[:n])) for n in range(len(order) + 1)] for order in orders]
    each = list(dict.fromkeys(itertools.chain(*sets)))
    chosen = [[subject.heads[head] for head in one] for one in each]
    rises = ablation_effects(subject.model, subject.held, chosen, subject.metrics[1], **how).mean
    of_set = dict(zip(each, rises.tolist(), strict=True))
    return [[of_set[one] for one in row] for row in sets]


def pruning(subject, point, n_orders, how):
    """A dict: the curves of each method and of random orders, and their areas up to half of the
    heads (the mean rise, in nats), with p-values: how often chance does as well."""
    n, generator = len(subject.heads), seeded_generator(2)
    orders = [row.argsort().tolist() for row in point]
    orders += [torch.randperm(n, generator=generator).tolist() for _ in range(n_orders)]
    curves = pruned(subject, orders, how)
    areas = torch.tensor(curves)[:, 1 : n // 2 + 1].mean(1)
    own, null = areas[: len(METHODS)], areas[len(METHODS) :]
    return {"curves": dict(zip(METHODS, curves, strict=False)), "random": curves[len(METHODS) :],
            "areas": dict(zip(METHODS, own.tolist(), strict=True)), "random_areas": null.tolist(),
            "p": {method: permutation_pvalue(-area, -null).item()
                  for method, area in zip(METHODS, own, strict=True)}}


def together(subject, how):
    """A dict: alone, each head's effect; pairs, what two do beyond the two; repair, for each head
    where its effect comes from (see `SelfRepair`): means over the held texts, in nats."""
    args = subject.model, subject.held
    pairs = pairwise_interaction(*args, subject.heads, subject.metrics[1], **how).mean
    repair = [self_repair(*args, head, subject.metrics[1], **how) for head in subject.heads]
    return {"alone": (-pairs.diagonal()).tolist(), "pairs": pairs.tolist(),
            "repair": {part: [getattr(one, part).mean().item() for one in repair]
                       for part in PARTS}}


def against_truth(subject, point, how):
    """A dict: each method's AUROC, the circuit's heads against those outside (spares, which look
    where its last head looks, are on neither side); the same of the untrained model, and of one
    with a head planted that is dead; and what that one is said to matter at most."""
    outside = [head for head in subject.heads if head not in subject.truth + subject.spares]
    kept = torch.tensor([head not in subject.spares for head in subject.heads])
    truth = torch.tensor([head in subject.truth for head in subject.heads])

    def scored(scores):
        return [auroc(row[kept], truth[kept]) for row in scores]

    untrained = effects(subject, GPT(subject.model.cfg, seed=0).eval()).mean(-1)
    (layer, head), planted = outside[0], copy.deepcopy(subject.model)
    with torch.no_grad():
        planted.blocks[layer].attn.W_O[head] = 0.0
    found = effects(subject, planted)
    scores = importance(found, even(found), subject.model.cfg.n_layers)
    dead = found[:, subject.heads.index(outside[0])].abs().max().item()
    return {"truth": truth.tolist(), "outside": outside, "dead": dead, "auroc": scored(point),
            "auroc_planted": scored(scores), "auroc_untrained": scored(untrained),
            "auroc_along": scored(along_the_way(subject)[None])[0]
            } | around(subject, outside, how)


def around(subject, outside, how):
    """A dict: the numbers of the circuit's heads, and of a spare one, if there is any; what all
    heads outside of it cost together, and what each other set of as many costs."""
    heads, (previous, induction) = subject.heads, subject.truth
    sets = [outside, *(list(some) for some in itertools.combinations(heads, len(outside))
                       if list(some) != outside)]
    costs = ablation_effects(subject.model, subject.held, sets, subject.metrics[1], **how).mean
    return {"previous": heads.index(previous), "induction": heads.index(induction),
            "spare": heads.index(subject.spares[0]) if subject.spares else None,
            "outside_cost": costs[0].item(), "other_costs": costs[1:].tolist()}


def even(found):
    """The same weight for each text, [batch]."""
    return torch.full((found.shape[-1],), 1 / found.shape[-1]).to(found)


def facts(subject, cfg):
    """All that is measured of a Subject, as plain values."""
    found, n_layers = effects(subject).double(), subject.model.cfg.n_layers
    point = importance(found, even(found), n_layers)
    draws = importance(found, redrawn(found.shape[2]), n_layers)
    low, high = middle(draws)
    how = {"mode": "mean", "reference": z_of(subject.model, subject.tokens)}
    result = {"name": subject.name, "heads": subject.heads, "importance": point.tolist(),
              "low": low, "high": high, "slope": found[3].mean(-1).tolist(),
              "agreement": agreement(point, draws),
              "pruning": pruning(subject, point, cfg.orders, how)} | together(subject, how)
    return result | (against_truth(subject, point, how) if subject.truth else {})


# The program


def run(cfg, folder):
    """{"claims": [Claim], "models": the facts of each}."""
    if cfg.quick:
        cfg = replace(cfg, steps=20, windows=8, orders=20, seeds=cfg.seeds[:1])
    models, progress = [], Progress(0, " models measured")
    for subject in subjects(cfg, folder):
        models.append(facts(subject, cfg))
        progress.show(len(models), subject.name)
    progress.close()
    return {"claims": claims_of(models, tested=not cfg.quick, own=cfg.run_name is None),
            "models": models}


def main(argv=None):
    """The program: measures, prints the table, writes outputs/head_importance."""
    perform(ImportanceConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
