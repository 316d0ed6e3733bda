"""What each tool says of the circuits of wired_circuits.py, held against what was wired.

A tool's scores rank the heads (or edges) of a model; AUROC is the chance that one which matters
ranks above one which does not. Where a tool is blind to a part of the circuit by construction (a
gradient to what is saturated), that part ties with the dead heads, and the AUROC that it must get
follows: (seen + missed / 2) / all. So a failure is predicted as exactly as a success.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Read before: experiments/wired_circuits.py; after: experiments/wired_facts.py
Source: the tools' own modules; Heimersheim & Nanda 2024 (what denoising and noising find in AND and
OR); Conmy et al. 2023 (what is lost of an OR)
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import circuits
from attribution import attribution_patching, direct_logit_attribution, integrated_gradients
from experiments.wired_board import GAIN, Pairs, Wired, named
from head_ablation import head_importance, head_importance_gradient
from metrics import auroc, duplicate_token_score, induction_score, prev_token_score
from patching import get_act_patch_attn_head_out_all_pos, path_patch, path_patch_matrix
from weight_circuits import composition_scores, ov_eigenvalue_score

FLOOR = 0.01  # below it a score counts as nothing, such as what an unread write does to LayerNorm


@dataclass(frozen=True)
class Case:
    """A wired model, its prompts, and the runs on both; gap: what separates their metrics."""

    wired: Wired
    pairs: Pairs
    clean: object
    corrupt: object
    gap: float

    @classmethod
    @torch.no_grad()
    def of(cls, wired, pairs):
        """Runs both."""
        (logits, clean), (others, corrupt) = map(wired.model.run_with_cache,
                                                 (pairs.clean, pairs.corrupt))
        gap = (pairs.metric(logits) - pairs.metric(others)).mean().item()
        return cls(wired, pairs, clean, corrupt, gap)

    @property
    def tokens(self):
        """Model, clean and corrupt tokens, metric: what tools that run both take."""
        return self.wired.model, self.pairs.clean, self.pairs.corrupt, self.pairs.metric

    @property
    def denoise(self):
        """Model, corrupt tokens, clean cache, metric."""
        return self.wired.model, self.pairs.corrupt, self.clean, self.pairs.metric

    @property
    def noise(self):
        """Model, clean tokens, corrupt cache, metric."""
        return self.wired.model, self.pairs.clean, self.corrupt, self.pairs.metric

    @property
    def ablate(self):
        """Model, clean tokens."""
        return self.wired.model, self.pairs.clean

    @property
    def shape(self):
        """(layers, heads)."""
        return self.wired.model.cfg.n_layers, self.wired.model.cfg.n_heads


@dataclass(frozen=True)
class Tool:
    """A tool, and what it must say.

    score: Case -> {part: score}, in shares of the gap or units of GAIN. parts: Truth -> the parts
    that matter, of the kind that it is about; none where it says nothing. sizes: Truth -> {part:
    size, or None where it is not known}, the parts that it must see. within: how near a size must
    be; None where sizes are not compared. misled: whether it takes decoys for the circuit.
    """

    name: str
    score: Callable
    sizes: Callable
    parts: Callable
    within: float | None = 0.01
    misled: bool = False

    def wired(self, truth):
        """The AUROC that it must have: what it does not see ties with what is dead."""
        parts, sizes = self.parts(truth), self.sizes(truth)
        if self.misled and truth.decoys:
            return 0.0
        return (sum(sizes.get(part, 0.0) != 0.0 for part in parts) / len(parts) + 1) / 2


def head_tool(name, score, sizes, **more):
    """A Tool whose score gives [layer, head], and which is asked for the heads that matter."""
    return Tool(name, lambda case: by_head(score(case)), sizes, lambda truth: truth.circuit, **more)


def by_head(scores):
    """[layer, head] -> {(layer, head): number}."""
    return {(layer, head): value for layer, row in enumerate(scores.tolist())
            for head, value in enumerate(row)}


def denoising(case):
    """The share that each clean head restores in the corrupt run, [layer, head]."""
    return get_act_patch_attn_head_out_all_pos(*case.denoise).normalized()


def noising(case):
    """The share that each corrupt head breaks in the clean run, [layer, head]."""
    return get_act_patch_attn_head_out_all_pos(*case.noise, direction="noising").normalized()


def slope(case):
    """The share that each clean head restores, to first order, [layer, head]."""
    return attribution_patching(*case.denoise, names="z")["z"].mean / case.gap


def integrated(case):
    """The part of each head in what its layer restores, by the slope all along the way."""
    layers = [integrated_gradients(*case.denoise, act_name=("z", layer), steps=48)[0]
              for layer in range(case.shape[0])]
    return torch.stack([found.sum((1, 3)).mean(0) for found in layers]) / case.gap


def direct(case):
    """What each head writes towards the right answer in the clean run, in units, [layer, head]."""
    found, labels = direct_logit_attribution(case.wired.model, case.clean, case.pairs.right,
                                             case.pairs.wrong, unit="head")
    heads = found[[row for row, label in enumerate(labels) if label.startswith("L")]]
    return heads.mean(-1).unflatten(0, case.shape) / GAIN


def shapley(truth):
    """What integrated gradients must say: where two heads play the same part, the mean of what one
    restores when it comes first (denoising) and of what it breaks when it goes first (noising)."""
    return {head: (truth.restores.get(head, 0.0) + truth.breaks.get(head, 0.0)) / 2
            for head in truth.circuit}


def steep(truth):
    """What the gradient must see of the heads: of what they add to the answer themselves, all."""
    return {head: size and abs(truth.direct[head]) for head, size in truth.slope.items()}


def pattern_tool(score, pattern):
    """A Tool from a score of attention patterns; it must find the heads that matter and look so."""
    def scores(case):
        layers = [score(case.clean["pattern", layer], case.pairs.clean)
                  for layer in range(case.shape[0])]
        return by_head(torch.stack(layers).nanmean(1))

    def looks(truth):
        return dict.fromkeys(truth.looks.get(pattern, ()))

    return Tool(f"{pattern} pattern", scores, looks, looks, within=None, misled=True)


def composed(case):
    """How much of what each earlier head writes each later head's Q or K reads:
    {(kind, layer, head, later layer, later head): share}."""
    heads = range(case.shape[1])
    shares = {kind: composition_scores(case.wired.model, kind, n_draws=2).scores.nan_to_num()
              for kind in "QK"}
    return {(kind, 0, head, 1, later): shares[kind][0, head, 1, later].item()
            for kind, head, later in itertools.product("QK", heads, heads)}


def edge_slopes(ig_steps):
    """A function: the score of each edge by EAP, or with more steps by EAP-IG, in units."""
    def scores(case):
        found = circuits.eap(*case.tokens, ig_steps=ig_steps)
        return {(writer, reader): score / GAIN
                for writer, reader, score in found.top(len(found.edges()))}
    return scores


def kept_edges(case):
    """1 for each edge that ACDC keeps, 0 for the others."""
    kept = circuits.acdc(*case.tokens, threshold=0.05 * GAIN).edges()
    return {edge: float(edge in kept) for edge in circuits.Circuit.of(case.wired.model).edges()}


def spared(truth):
    """The edges that ACDC must keep: of two heads either of which would do, those of one."""
    spare = named(max(truth.circuit)) if not truth.breaks else None
    return {edge: None for edge in truth.edges if spare not in (edge[0], edge[1][:3])}


def paths(case):
    """The share restored by each head's clean write along each direct path from it."""
    model, clean, corrupt, metric = case.tokens
    found, (n_layers, n_heads) = {}, case.shape
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        mlps = {f"{later}.mlp": f"blocks.{later}.hook_mlp_in" for later in range(layer, n_layers)}
        for reader, point in ({"logits": "logits"} | mlps).items():
            found[named((layer, head)), reader] = path_patch(
                model, corrupt, clean, senders=[(f"blocks.{layer}.attn.hook_z", head)],
                receivers=[point], metric=metric, freeze="all").normalized().item()
    for letter in "qkv" if n_layers == 2 else "":
        shares = path_patch_matrix(model, corrupt, clean, metric, receiver=letter,
                                   freeze="all").normalized()
        for head, later in itertools.product(range(n_heads), range(n_heads)):
            found[named((0, head)), named((1, later), letter)] = shares[0, head, 1, later].item()
    return found


def measured_edges(truth):
    """The edges whose share by path patching is known."""
    return {edge: share for edge, share in truth.edges.items() if share is not None}


TOOLS = [
    head_tool("activation patching, denoising", denoising, lambda truth: truth.restores),
    head_tool("activation patching, noising", noising, lambda truth: truth.breaks),
    Tool("path patching (edges)", paths, measured_edges, measured_edges),
    head_tool("zero ablation", lambda case: -head_importance(
        *case.ablate, case.pairs.metric).mean / GAIN, lambda truth: truth.removed),
    head_tool("gradient importance", lambda case: head_importance_gradient(
        *case.ablate, case.pairs.metric) / GAIN, steep),
    head_tool("attribution patching", slope, lambda truth: truth.slope),
    head_tool("integrated gradients", integrated, shapley, within=0.02),
    head_tool("direct logit attribution", direct, lambda truth: truth.direct),
    Tool("EAP (edges)", edge_slopes(1), lambda truth: dict.fromkeys(set(truth.edges) - truth.flat),
         lambda truth: truth.edges, within=None),
    Tool("EAP-IG (edges)", edge_slopes(12), lambda truth: dict.fromkeys(truth.edges),
         lambda truth: truth.edges, within=None),
    Tool("ACDC (edges)", kept_edges, spared, lambda truth: truth.edges, within=None),
    pattern_tool(lambda pattern, tokens: prev_token_score(pattern), "previous-token"),
    pattern_tool(duplicate_token_score, "duplicate-token"),
    pattern_tool(induction_score, "induction"),
    Tool("OV eigenvalues", lambda case: by_head(ov_eigenvalue_score(case.wired.model).nan_to_num()),
         lambda truth: truth.copies, lambda truth: truth.copies, within=None),
    Tool("composition (pairs)", composed, lambda truth: dict.fromkeys(truth.composes),
         lambda truth: truth.composes, within=None),
]


@dataclass(frozen=True)
class Row:
    """A tool on a circuit: its AUROC, the one that follows from the wiring, and the largest error
    of a size (0 where sizes are not compared)."""

    tool: str
    circuit: str
    auroc: float
    wired: float
    error: float


def judged(tool, case):
    """The Row of a tool on a case; None where it says nothing about such a circuit."""
    truth = case.wired.truth
    parts, sizes = tool.parts(truth), tool.sizes(truth)
    if not parts:
        return None
    scores = tool.score(case)
    found = torch.tensor([abs(score) if abs(score) > FLOOR else 0.0 for score in scores.values()])
    errors = [abs(score - sizes.get(part, 0.0)) for part, score in scores.items()
              if tool.within and sizes.get(part, 0.0) is not None]
    return Row(tool.name, case.wired.name,
               auroc(found, torch.tensor([part in parts for part in scores])),
               tool.wired(truth), max(errors, default=0.0))
