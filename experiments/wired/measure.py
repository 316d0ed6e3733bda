"""What each tool of the library says of the wired circuits, held against what was wired.

A tool's scores rank the heads (or edges) of a model; AUROC is the chance that one which matters
ranks above one which does not. Where a tool is blind to a part of the circuit by construction (a
gradient to what is saturated), that part ties with the dead heads, and the AUROC that it must get
follows: (seen + missed / 2) / all. So a failure is predicted as exactly as a success.

What no ranking shows stands below the tools: facts, each a number that follows from the wiring
beside the one that was measured.

Chapter: COURSE_ROADMAP.md, 9 (intervene), 10 (approximate) and 13 (decodable is not used)
Prerequisites: experiments/wired/model.py
Next: experiments/wired/report.py
Source: the tools' own modules; Heimersheim & Nanda 2024 (what denoising and noising find in AND and
OR); Conmy et al. 2023 (what is lost of an OR); Hewitt & Liang 2019 (a probe finds what is not
used); Kramár et al. 2024 (saturation); McDougall et al. 2023 and Rushing & Nanda 2024 (self-repair)
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

import circuits
from activation_cache import ActivationCache
from attribution import attribution_patching, direct_logit_attribution, integrated_gradients
from experiments.wired.board import GAIN, random_texts
from experiments.wired.model import Pairs, WiredCircuit, mlp_name, node_name
from head_ablation import (
    head_importance,
    head_importance_gradient,
    pairwise_interaction,
    self_repair,
)
from logit_lens import logit_lens
from metrics import auroc, duplicate_token_score, induction_score, prev_token_score
from patching import (
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_q_all_pos,
    path_patch,
    path_patch_matrix,
)
from probing import concept_erasure, fit_probe
from utils import seeded_generator
from weight_circuits import composition_scores, ov_eigenvalue_score

FLOOR = 0.01  # below it a score counts as nothing, such as what an unread write does to LayerNorm
PROBED = "blocks.0.hook_resid_post"


@dataclass(frozen=True)
class Case:
    """A wired circuit, its prompts, and the runs on both; gap: what separates their metrics."""

    wired: WiredCircuit
    pairs: Pairs
    clean_cache: ActivationCache
    corrupted_cache: ActivationCache
    gap: float

    @classmethod
    @torch.no_grad()
    def run(cls, wired, pairs):
        """The Case of a circuit and its Pairs: runs both."""
        clean_logits, clean_cache = wired.model.run_with_cache(pairs.clean_tokens)
        corrupted_logits, corrupted_cache = wired.model.run_with_cache(pairs.corrupted_tokens)
        gap = (pairs.metric(clean_logits) - pairs.metric(corrupted_logits)).mean().item()
        return cls(wired, pairs, clean_cache, corrupted_cache, gap)

    @property
    def both(self):
        """What tools that run both texts take: model, clean and corrupted tokens, metric."""
        return (self.wired.model, self.pairs.clean_tokens, self.pairs.corrupted_tokens,
                self.pairs.metric)

    @property
    def denoising(self):
        """What tools that put clean into corrupted take: model, corrupted tokens, clean cache,
        metric."""
        return (self.wired.model, self.pairs.corrupted_tokens, self.clean_cache,
                self.pairs.metric)

    @property
    def noising(self):
        """The other way round: model, clean tokens, corrupted cache, metric."""
        return (self.wired.model, self.pairs.clean_tokens, self.corrupted_cache,
                self.pairs.metric)

    @property
    def ablation(self):
        """What tools that take something away take: model, clean tokens."""
        return self.wired.model, self.pairs.clean_tokens

    @property
    def shape(self):
        """(layers, heads)."""
        return self.wired.model.cfg.n_layers, self.wired.model.cfg.n_heads


# The tools


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

    def expected_auroc(self, truth):
        """The AUROC that it must have: what it does not see ties with what is dead."""
        if self.misled and truth.decoys:
            return 0.0
        parts, sizes = self.parts(truth), self.sizes(truth)
        n_seen = sum(sizes.get(part, 0.0) != 0.0 for part in parts)
        return (n_seen / len(parts) + 1) / 2


def head_tool(name, score, sizes, **more):
    """A Tool whose score gives [layer, head], and which is asked for the heads that matter."""
    return Tool(name, lambda case: by_head(score(case)), sizes, lambda truth: truth.heads, **more)


def pattern_tool(score, pattern):
    """A Tool from a score of attention patterns; it must find the heads that matter and look so."""
    def score_heads(case):
        layers = [score(case.clean_cache["pattern", layer], case.pairs.clean_tokens)
                  for layer in range(case.shape[0])]
        return by_head(torch.stack(layers).nanmean(1))

    def heads_that_look_so(truth):
        return dict.fromkeys(truth.looks.get(pattern, ()))

    return Tool(f"{pattern} pattern", score_heads, heads_that_look_so, heads_that_look_so,
                within=None, misled=True)


def by_head(scores):
    """[layer, head] -> {(layer, head): number}."""
    return {(layer, head): value for layer, row in enumerate(scores.tolist())
            for head, value in enumerate(row)}


# Scores of heads, [layer, head]


def denoising_shares(case):
    """The share that each clean head restores in the corrupted run."""
    return get_act_patch_attn_head_out_all_pos(*case.denoising).normalized()


def noising_shares(case):
    """The share that each corrupted head breaks in the clean run."""
    return get_act_patch_attn_head_out_all_pos(*case.noising, direction="noising").normalized()


def slope_shares(case):
    """The share that each clean head restores, to first order."""
    return attribution_patching(*case.denoising, names="z")["z"].mean / case.gap


def integrated_shares(case):
    """The part of each head in what its layer restores, by the slope all along the way."""
    layers = [integrated_gradients(*case.denoising, act_name=("z", layer), steps=48)[0]
              for layer in range(case.shape[0])]
    return torch.stack([found.sum((1, 3)).mean(0) for found in layers]) / case.gap


def removed_units(case):
    """What each head takes with it where it writes zero, in units."""
    return -head_importance(*case.ablation, case.pairs.metric).mean / GAIN


def removed_units_by_gradient(case):
    """The same to first order."""
    return head_importance_gradient(*case.ablation, case.pairs.metric) / GAIN


def direct_units(case):
    """What each head writes towards the right answer in the clean run, in units."""
    found, labels = direct_logit_attribution(case.wired.model, case.clean_cache, case.pairs.right,
                                             case.pairs.wrong, unit="head")
    heads = found[[row for row, label in enumerate(labels) if label.startswith("L")]]
    return heads.mean(-1).unflatten(0, case.shape) / GAIN


def ov_scores(case):
    """Does each head copy (1) or unsay (-1) what it looks at, by its weights alone?"""
    return ov_eigenvalue_score(case.wired.model).nan_to_num()


# What they must say, from the Truth


def shapley_values(truth):
    """What integrated gradients must say: where two heads play the same part, the mean of what one
    restores when it comes first (denoising) and of what it breaks when it goes first (noising)."""
    return {head: (truth.restores.get(head, 0.0) + truth.breaks.get(head, 0.0)) / 2
            for head in truth.heads}


def visible_sizes(truth):
    """What the gradient must see of the heads: of what they add to the answer themselves, all."""
    return {head: size and abs(truth.direct[head]) for head, size in truth.slope.items()}


def steep_edges(truth):
    """The edges that a gradient passes."""
    return dict.fromkeys(set(truth.edges) - truth.flat)


def kept_edges(truth):
    """The edges that ACDC must keep: of two heads either of which would do, those of one."""
    if truth.breaks:
        return dict.fromkeys(truth.edges)
    spare = node_name(max(truth.heads))
    return {(writer, reader): None for writer, reader in truth.edges
            if writer != spare and not reader.startswith(f"{spare}.")}


def measured_edges(truth):
    """The edges whose share by path patching is known."""
    return {edge: share for edge, share in truth.edges.items() if share is not None}


# Scores of edges and of pairs, {part: score}


def composition_shares(case):
    """How much of what each earlier head writes each later head's Q or K reads:
    {(kind, layer, head, later layer, later head): share}."""
    heads = range(case.shape[1])
    shares = {kind: composition_scores(case.wired.model, kind, n_draws=2).scores.nan_to_num()
              for kind in "QK"}
    return {(kind, 0, head, 1, later): shares[kind][0, head, 1, later].item()
            for kind, head, later in itertools.product("QK", heads, heads)}


def eap_scorer(ig_steps):
    """A function: the score of each edge by EAP, or with more steps by EAP-IG, in units."""
    def score_edges(case):
        found = circuits.eap(*case.both, ig_steps=ig_steps)
        return {(writer, reader): score / GAIN
                for writer, reader, score in found.top(len(found.edges()))}
    return score_edges


def acdc_choice(case):
    """1 for each edge that ACDC keeps, 0 for the others."""
    kept = circuits.acdc(*case.both, threshold=0.05 * GAIN).edges()
    return {edge: float(edge in kept) for edge in circuits.Circuit.of(case.wired.model).edges()}


def path_shares(case):
    """The share restored by each head's clean write along each direct path from it."""
    model, clean_tokens, corrupted_tokens, metric = case.both
    n_layers, n_heads = case.shape
    found = {}

    # From each head to the logits, and to its own and each later MLP.
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        receivers = {"logits": "logits"}
        for later in range(layer, n_layers):
            receivers[mlp_name(later)] = f"blocks.{later}.hook_mlp_in"
        for reader, point in receivers.items():
            patched = path_patch(model, corrupted_tokens, clean_tokens,
                                 senders=[(f"blocks.{layer}.attn.hook_z", head)],
                                 receivers=[point], metric=metric, freeze="all")
            found[node_name((layer, head)), reader] = patched.normalized().item()

    # From each head of the first of two layers to each input of the second's.
    if n_layers == 2:
        for letter in "qkv":
            shares = path_patch_matrix(model, corrupted_tokens, clean_tokens, metric,
                                       receiver=letter, freeze="all").normalized()
            for head, later in itertools.product(range(n_heads), range(n_heads)):
                edge = node_name((0, head)), node_name((1, later), letter)
                found[edge] = shares[0, head, 1, later].item()
    return found


TOOLS = [
    head_tool("activation patching, denoising", denoising_shares, lambda truth: truth.restores),
    head_tool("activation patching, noising", noising_shares, lambda truth: truth.breaks),
    Tool("path patching (edges)", path_shares, measured_edges, measured_edges),
    head_tool("zero ablation", removed_units, lambda truth: truth.removed),
    head_tool("gradient importance", removed_units_by_gradient, visible_sizes),
    head_tool("attribution patching", slope_shares, lambda truth: truth.slope),
    head_tool("integrated gradients", integrated_shares, shapley_values, within=0.02),
    head_tool("direct logit attribution", direct_units, lambda truth: truth.direct),
    Tool("EAP (edges)", eap_scorer(1), steep_edges, lambda truth: truth.edges, within=None),
    Tool("EAP-IG (edges)", eap_scorer(12), lambda truth: dict.fromkeys(truth.edges),
         lambda truth: truth.edges, within=None),
    Tool("ACDC (edges)", acdc_choice, kept_edges, lambda truth: truth.edges, within=None),
    pattern_tool(lambda pattern, tokens: prev_token_score(pattern), "previous-token"),
    pattern_tool(duplicate_token_score, "duplicate-token"),
    pattern_tool(induction_score, "induction"),
    Tool("OV eigenvalues", lambda case: by_head(ov_scores(case)),
         lambda truth: truth.copies, lambda truth: truth.copies, within=None),
    Tool("composition (pairs)", composition_shares, lambda truth: dict.fromkeys(truth.composes),
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


def judge_tool(tool, case):
    """The Row of a tool on a case; None where it says nothing about such a circuit."""
    truth = case.wired.truth
    parts, sizes = tool.parts(truth), tool.sizes(truth)
    if not parts:
        return None

    scores = tool.score(case)
    heights = [abs(score) if abs(score) > FLOOR else 0.0 for score in scores.values()]
    found = auroc(torch.tensor(heights), torch.tensor([part in parts for part in scores]))

    errors = []
    if tool.within:
        for part, score in scores.items():
            size = sizes.get(part, 0.0)
            if size is not None:
                errors.append(abs(score - size))
    return Row(tool.name, case.wired.name, found, tool.expected_auroc(truth),
               max(errors, default=0.0))


# The facts


class Fact(NamedTuple):
    """A number that follows from the wiring: measured, wired, and how far they may lie apart."""

    measured: float
    wired: float
    within: float

    @property
    def holds(self):
        """Whether they lie near enough."""
        return abs(self.measured - self.wired) <= self.within


def fact(measured, wired, within=0.01):
    """A Fact of plain numbers."""
    return Fact(float(measured), float(wired), within)


def measure_facts(case):
    """{what: Fact} of a case: those of every circuit, and its own."""
    found = measure_behaviour(case)
    own = OWN_FACTS.get(case.wired.name)
    return found | own(case) if own else found


def answer_accuracy(wired, texts):
    """The share of positions at which the model says the answer, of those that have one."""
    with torch.no_grad():
        said = wired.model(texts).argmax(-1).tolist()
    right = []
    for text, tokens in zip(texts.tolist(), said, strict=True):
        for end, token in enumerate(tokens, 1):
            answer = wired.answer(text[:end])
            if answer is not None:
                right.append(token == answer)
    return statistics.mean(right)


@torch.no_grad()
def measure_behaviour(case):
    """Is the task done, in another basis too, and by the wired edges alone?"""
    wired = case.wired
    model, clean_tokens, corrupted_tokens, metric = case.both
    texts = random_texts(100, seeded_generator(0))
    moved = wired.rotated(0).model(texts) - model(texts)
    edges = circuits.Circuit.of(model, list(wired.truth.edges))
    kept = circuits.faithfulness(edges, model, clean_tokens, corrupted_tokens, metric=metric).mean
    return {
        "share of right answers to random texts": fact(answer_accuracy(wired, texts), 1, 0.0),
        "largest change of a logit in a rotated basis": fact(moved.abs().max(), 0, 1e-4),
        "faithfulness of the wired edges alone": fact(kept, 1),
    }


def measure_gate(case):
    """What removing both heads costs beyond removing each. And OV's eigenvalues, whose score has no
    size: those of a head that says nothing are rounding, and score as a perfect copy."""
    name = case.wired.name
    heads = sorted(case.wired.truth.heads)
    beyond = -pairwise_interaction(*case.ablation, heads, case.pairs.metric).mean[0, 1] / GAIN
    copies = ov_eigenvalue_score(case.wired.model)
    return {
        f"{name}: cost of removing both heads, beyond that of each":
            fact(beyond, {"OR": 2, "AND": -2}[name]),
        f"{name}: |OV eigenvalue score| of heads that say nothing":
            fact(min(abs(copies[head].item()) for head in heads), 1),
    }


def measure_suppression(case):
    """The predicting head speaks for the wrong answer itself, and for the right one by way of the
    head that it sets off: the gradient and the lens see the first alone."""
    early = min(case.wired.truth.heads)
    lens = logit_lens(case.wired.model, case.clean_cache)
    lead = case.pairs.metric(lens.logits).mean(-1) / GAIN
    gone = self_repair(*case.ablation, early, case.pairs.metric)
    facts = {
        "share restored by the predictor": fact(denoising_shares(case)[early], 1),
        "the same by its gradient, whose sign is wrong": fact(slope_shares(case)[early], -1),
        "lead of the answer in the lens, before": fact(lead[1], -0.5),
        "lead of the answer in the lens, after": fact(lead[-1], 0.5),
        "predictor removed, effect of its write": fact(gone.direct.mean() / GAIN, 0.5),
        "predictor removed, effect of where others look":
            fact(gone.by_patterns.mean() / GAIN, -1),
    }
    return {f"copy suppression: {what}": each for what, each in facts.items()}


def measure_saturation(case):
    """A query that decides where to look: patched, by its gradient, and by the gradient after the
    softmax."""
    late = max(case.wired.truth.heads)
    exact = get_act_patch_attn_head_q_all_pos(*case.denoising).normalized()[late]

    def share_by_gradient(fixes):
        return attribution_patching(*case.denoising, names="q", fixes=fixes)["q"].mean[late] \
            / case.gap

    what = "saturated softmax: share restored by the query"
    return {
        f"{what}, patched": fact(exact, 1),
        f"{what}, by its gradient": fact(share_by_gradient(()), 0, 1e-3),
        f"{what}, by the gradient after the softmax": fact(share_by_gradient(("qk",)), 1),
    }


def measure_dead_heads(case):
    """Pretty patterns, and no effect."""
    restored = by_head(denoising_shares(case))
    dead = [head for head in restored if head not in case.wired.truth.heads]
    pattern = prev_token_score(case.clean_cache["pattern", 0]).mean(0)
    return {
        "dead heads: their least previous-token score":
            fact(min(pattern[head] for _, head in dead), 1, 1e-3),
        "dead heads: the largest share that one restores":
            fact(max(abs(restored[head]) for head in dead), 0, 1e-3),
    }


def measure_bits(case):
    """What a probe reads, and what is lost once no probe can read it any more. What the two bits
    share by chance in these texts goes with either."""
    model = case.wired.model
    pairs = case.wired.draw_pairs(256, seeded_generator(0))
    with torch.no_grad():
        last = model.run_with_cache(pairs.clean_tokens, PROBED)[1][PROBED][:, -1]

    def mean_lead(logits):
        return pairs.metric(logits).mean()

    facts = {}
    for name, bit in case.wired.bits.items():
        labels = torch.tensor([int(bit(text)) for text in pairs.clean_tokens.tolist()])
        probe = fit_probe(last, labels)
        erasure = concept_erasure(model, pairs.clean_tokens, mean_lead, probe, at=PROBED,
                                  n_random=1)
        lost = 1 - erasure.erased / erasure.clean
        is_used = name == "used"
        facts[f"unused bit: a probe's accuracy on the {name} bit"] = fact(probe.accuracy, 1, 0.0)
        facts[f"unused bit: share of the lead lost with the {name} bit"] = fact(lost, is_used, 0.05)
    return facts


OWN_FACTS = {"OR": measure_gate, "AND": measure_gate, "copy suppression": measure_suppression,
             "saturated softmax": measure_saturation, "dead heads": measure_dead_heads,
             "unused bit": measure_bits}
