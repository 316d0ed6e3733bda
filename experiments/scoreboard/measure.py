"""Score methods by how well they rank the edges of a model: over circuit sizes, against the truth,
and over prompts.

Every method gives each edge a score. If a method is blind to some true edges by construction, these
tie with dead edges, and its AUROC is (seen / all + 1) / 2.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: circuit_evaluation.py, experiments/scoreboard/model.py
Next: experiments/scoreboard/report.py
Source: Mueller et al. 2025 (CPR, CMD); Méloux et al. 2025 (stability over prompts)
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from circuit_evaluation import (
    bootstrap_stability,
    circuit_stability,
    curve_sizes,
    faithfulness_curve,
    random_jaccard,
    random_ranking,
    ranked_edges,
    thresholds_outlived,
)
from circuits import CircuitRun, EdgeScores, eap, exact_edge_scores, prune
from experiments.wired.measure import FLOOR, kept_edges, steep_edges
from experiments.wired.model import Pairs
from metrics import auroc, bootstrap_draws
from utils import seeded_generator

IG_STEPS = 12  # as for the wired circuits; 0.5 lies among the shares of left and right
THRESHOLDS = (0.02, 0.05, 0.2)  # of ACDC, as shares of the gap between clean and corrupted
STABLE_EDGES = 7  # size of the sets compared over prompts, if the truth is not known
ACDC_DRAWS = 4  # draws of prompts on which ACDC runs again
SERIES = ("previous token", "duplicate token", "induction", "dead heads", "unused bit",
          "saturated softmax")  # wired circuits that break if any one edge is cut


@dataclass(frozen=True)
class Method:
    """A method: score(scored, run) -> EdgeScores; sees(truth) -> the true edges that it can see."""

    score: Callable
    sees: Callable


def exact_scores(scored, run):
    """The EdgeScores of activation patching: the exact effect of cutting each edge."""
    return exact_edge_scores(run)


def eap_scores(**how):
    """A score function for EAP with these arguments."""
    return lambda scored, run: eap(*scored.both, **how)


def acdc_scores(scored, run):
    """The EdgeScores of ACDC: how many of its thresholds each edge survives (equal for all
    prompts)."""
    gap = mean_gap(run)
    counts = thresholds_outlived(run, [share * gap for share in THRESHOLDS]).double()
    n_prompts = len(scored.pairs.right)
    return EdgeScores(counts[:, None].expand(-1, n_prompts), ("edge",), run.full)


def mean_gap(run):
    """|metric with all edges - metric with none|, averaged over prompts."""
    return (run.value(run.full) - run.value(run.full.only([]))).mean().abs().item()


def edges_needed_alone(truth):
    """The true edges with an effect when they alone are cut; in an OR, only the last edge."""
    alone = set(truth.edges) if truth.breaks else set(truth.edges) - truth.flat
    return dict.fromkeys(alone)


def all_true_edges(truth):
    """All true edges, which a gradient sees that is averaged along the whole path."""
    return dict.fromkeys(truth.edges)


METHODS = {
    "exact": Method(exact_scores, edges_needed_alone),
    "EAP": Method(eap_scores(), steep_edges),
    "EAP-IG left": Method(eap_scores(ig_steps=IG_STEPS, rule="left"), all_true_edges),
    "EAP-IG right": Method(eap_scores(ig_steps=IG_STEPS, rule="right"), all_true_edges),
    "EAP-IG gauss": Method(eap_scores(ig_steps=IG_STEPS, rule="gauss"), all_true_edges),
    "ACDC": Method(acdc_scores, kept_edges),
}


class RunOnce(CircuitRun):
    """A CircuitRun that runs no circuit twice. All rankings begin with no edge and end with all
    edges, and they share many small circuits."""

    def __init__(self, *args):
        super().__init__(*args)
        self.known = {}  # the values of each circuit's mask

    def value(self, circuit):
        """The metric of each prompt, [batch]."""
        key = circuit.mask.numpy().tobytes()
        if key not in self.known:
            self.known[key] = super().value(circuit)
        return self.known[key]


def score_model(scored, seed, n_random):
    """The rows of a model: a list with a dict for each method, and one for random rankings.

    method, model, seed; cpr, cmd; auroc, and wired: the value that it must have (None without a
    truth); stability and chance: the mean Jaccard over draws of prompts, and of random sets;
    seconds. The last row describes n_random random rankings: it has cmds and cprs, a number for
    each ranking, and expected, from `series_cmd` (None if the circuit is not a series).
    """
    run = CircuitRun(*scored.both)  # for the methods, whose seconds count
    run_once = RunOnce(*scored.both)
    n_stable = len(scored.truth.edges) if scored.truth else STABLE_EDGES
    rows = []
    for name, method in METHODS.items():
        began = time.perf_counter()
        scores = method.score(scored, run)
        seconds = time.perf_counter() - began
        match = faithfulness_curve(run_once, ranked_edges(scores))
        signed = match if name == "ACDC" else faithfulness_curve(
            run_once, ranked_edges(scores, by="sign"))  # ACDC's scores have no sign

        if name == "ACDC":
            stability = acdc_stability(scored, seed)
        else:
            stability = bootstrap_stability(scores, n_stable, seed=seed)
        rows.append({"method": name, "model": scored.name, "seed": seed, "cpr": signed.cpr,
                     "cmd": match.cmd, "stability": stability.mean, "chance": stability.chance,
                     "seconds": seconds} | compare_with_truth(scored, scores, method, run))
    rows.append(score_random(scored, run_once, seed, n_random, n_stable))
    return rows


def compare_with_truth(scored, scores, method, run):
    """{"auroc", "wired"} of EdgeScores; both None if the truth is not known."""
    if scored.truth is None:
        return {"auroc": None, "wired": None}
    floor = FLOOR * mean_gap(run)
    heights = scores.mean.abs()
    heights = torch.where(heights > floor, heights, 0.0)
    is_true = torch.tensor([edge in scored.truth.edges for edge in scores.edges()])
    share_seen = len(method.sees(scored.truth)) / len(scored.truth.edges)
    return {"auroc": auroc(heights, is_true), "wired": (share_seen + 1) / 2}


def acdc_stability(scored, seed):
    """The CircuitStability of the circuits that ACDC finds on redrawn prompts."""
    pairs = scored.pairs
    found = []
    for draw in bootstrap_draws(len(pairs.right), ACDC_DRAWS, seed=seed):
        drawn = Pairs(pairs.clean_tokens[draw], pairs.corrupted_tokens[draw], pairs.right[draw],
                      pairs.wrong[draw])
        run = CircuitRun(scored.model, drawn.clean_tokens, drawn.corrupted_tokens, drawn.metric)
        found.append(prune(run, threshold=THRESHOLDS[1] * mean_gap(run)))
    return circuit_stability(found)


def score_random(scored, run, seed, n_random, n_stable):
    """The row of random rankings."""
    # models of one shape get different rankings
    generator = seeded_generator(seed + zlib.crc32(scored.name.encode()))
    began = time.perf_counter()
    rankings = [random_ranking(run.full, generator) for _ in range(n_random)]
    seconds = (time.perf_counter() - began) / n_random
    curves = [faithfulness_curve(run, ranking) for ranking in rankings]
    cmds = [curve.cmd for curve in curves]
    cprs = [curve.cpr for curve in curves]

    found = None
    if scored.truth:
        places = torch.arange(len(run.full)).flip(0)
        found = sum(auroc(places, torch.tensor([edge in scored.truth.edges for edge in ranking]))
                    for ranking in rankings) / n_random
    is_series = scored.truth is not None and scored.name in SERIES
    expected = series_cmd(len(run.full), len(scored.truth.edges)) if is_series else None
    chance = random_jaccard(n_stable, n_stable, len(run.full))
    return {"method": "random", "model": scored.name, "seed": seed,
            "cpr": sum(cprs) / n_random, "cmd": sum(cmds) / n_random, "cmds": cmds, "cprs": cprs,
            "auroc": found, "wired": None if found is None else 0.5, "stability": chance,
            "chance": chance, "seconds": seconds, "expected": expected}


def series_cmd(n_edges, n_true):
    """(mean, standard deviation) of the CMD of a random ranking, if faithfulness is 1 with all true
    edges and 0 if one is missing.

    The best n of N edges contain all k true ones with probability C(N-k, n-k) / C(N, n). CMD
    depends only on the first size that contains them, so its whole distribution is known.
    """
    sizes = curve_sizes(n_edges)
    shares = torch.tensor(sizes).double() / n_edges
    holds = [math.comb(n_edges - n_true, n - n_true) / math.comb(n_edges, n) if n >= n_true else 0
             for n in sizes]  # [size], the chance that all true edges are in
    first = torch.tensor(holds).diff(prepend=torch.zeros(1)).double()  # ... for the first time
    step = torch.arange(len(sizes))
    far = (step < step[:, None]).double()  # [which is first, size]: 1 before it
    areas = torch.trapezoid(far, shares, dim=1)  # [which is first]
    mean = (first * areas).sum()
    spread = ((first * (areas - mean) ** 2).sum()).sqrt()
    return mean.item(), spread.item()
