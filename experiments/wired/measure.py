"""Compare the results of each tool of the library with the truth of the wired circuits.

A tool's scores rank the heads (or edges) of a model. AUROC is the chance that a part that matters
ranks above one that does not. If a tool is blind to a part of the circuit by construction (such as
a gradient to a saturated part), this part ties with the dead heads, and the AUROC must be
(seen + missed / 2) / all. So a failure is predicted as exactly as a success.

Below the tools are facts, for what no ranking shows: each is a measured number beside the one that
follows from the wiring.

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

FLOOR = 0.01  # lower scores count as 0; an unread write still changes LayerNorm's scale a little
PROBED = "blocks.0.hook_resid_post"


@dataclass(frozen=True)
class Case:
    """A wired circuit, its prompts, and its runs on both; gap: the difference of their metrics."""

    wired: WiredCircuit
    pairs: Pairs
    clean_cache: ActivationCache
    corrupted_cache: ActivationCache
    gap: float

    @classmethod
    @torch.no_grad()
    def run(cls, wired, pairs):
        """Run the model on both texts of the Pairs, and return the Case."""
        clean_logits, clean_cache = wired.model.run_with_cache(pairs.clean_tokens)
        corrupted_logits, corrupted_cache = wired.model.run_with_cache(pairs.corrupted_tokens)
        gap = (pairs.metric(clean_logits) - pairs.metric(corrupted_logits)).mean().item()
        return cls(wired, pairs, clean_cache, corrupted_cache, gap)

    @property
    def both(self):
        """The arguments of tools that run both texts: model, clean tokens, corrupted tokens,
        metric."""
        return (self.wired.model, self.pairs.clean_tokens, self.pairs.corrupted_tokens,
                self.pairs.metric)

    @property
    def denoising(self):
        """The arguments of tools that patch clean into corrupted: model, corrupted tokens, clean
        cache, metric."""
        return (self.wired.model, self.pairs.corrupted_tokens, self.clean_cache,
                self.pairs.metric)

    @property
    def noising(self):
        """The arguments of tools that patch corrupted into clean: model, clean tokens, corrupted
        cache, metric."""
        return (self.wired.model, self.pairs.clean_tokens, self.corrupted_cache,
                self.pairs.metric)

    @property
    def ablation(self):
        """The arguments of tools that ablate: model, clean tokens."""
        return self.wired.model, self.pairs.clean_tokens

    @property
    def shape(self):
        """(number of layers, number of heads)."""
        return self.wired.model.cfg.n_layers, self.wired.model.cfg.n_heads


# The tools


@dataclass(frozen=True)
class Tool:
    """A tool, and the results that it must give.

    score: Case -> {part: score}, in shares of the gap or in units of GAIN. parts: Truth -> the
    parts (heads, edges, pairs) that matter; none if the tool does not apply to the circuit. sizes:
    Truth -> {part: size, or None if it is not known}, the parts that it must see. within: the
    largest error of a size; None if sizes are not compared. misled: whether the tool mistakes
    decoys for the circuit.
    """

    name: str
    score: Callable
    sizes: Callable
    parts: Callable
    within: float | None = 0.01
    misled: bool = False

    def expected_auroc(self, truth):
        """The AUROC that the tool must have: parts that it can't see tie with dead ones."""
        if self.misled and truth.decoys:
            return 0.0
        parts, sizes = self.parts(truth), self.sizes(truth)
        n_seen = sum(sizes.get(part, 0.0) != 0.0 for part in parts)
        return (n_seen / len(parts) + 1) / 2


def head_tool(name, score, sizes, **more):
    """A Tool that scores heads: its score returns [layer, head], its parts are heads."""
    return Tool(name, lambda case: by_head(score(case)), sizes, lambda truth: truth.heads, **more)


def pattern_tool(score, pattern):
    """A Tool that scores attention patterns; it must find the heads that matter and have this
    pattern."""
    def score_heads(case):
        layers = [score(case.clean_cache["pattern", layer], case.pairs.clean_tokens)
                  for layer in range(case.shape[0])]
        return by_head(torch.stack(layers).nanmean(1))

    def heads_that_look_so(truth):
        return dict.fromkeys(truth.looks.get(pattern, ()))

    return Tool(f"{pattern} pattern", score_heads, heads_that_look_so, heads_that_look_so,
                within=None, misled=True)


def by_head(scores):
    """Turn scores [layer, head] into {(layer, head): number}."""
    return {(layer, head): value for layer, row in enumerate(scores.tolist())
            for head, value in enumerate(row)}


# Scores of heads, [layer, head]


def denoising_shares(case):
    """The share of the gap that each clean head restores in the corrupted run."""
    return get_act_patch_attn_head_out_all_pos(*case.denoising).normalized()


def noising_shares(case):
    """The share of the gap that each corrupted head breaks in the clean run."""
    return get_act_patch_attn_head_out_all_pos(*case.noising, direction="noising").normalized()


def slope_shares(case):
    """The share of the gap that each clean head restores, to first order."""
    return attribution_patching(*case.denoising, names="z")["z"].mean / case.gap


def integrated_shares(case):
    """Each head's part in what its layer restores, by the slope along the whole path."""
    layers = [integrated_gradients(*case.denoising, act_name=("z", layer), steps=48)[0]
              for layer in range(case.shape[0])]
    return torch.stack([found.sum((1, 3)).mean(0) for found in layers]) / case.gap


def removed_units(case):
    """The fall of the metric when each head writes zero, in units of GAIN."""
    return -head_importance(*case.ablation, case.pairs.metric).mean / GAIN


def removed_units_by_gradient(case):
    """The fall of the metric when each head writes zero, to first order, in units of GAIN."""
    return head_importance_gradient(*case.ablation, case.pairs.metric) / GAIN


def direct_units(case):
    """Each head's direct effect on the right answer in the clean run, in units of GAIN."""
    found, labels = direct_logit_attribution(case.wired.model, case.clean_cache, case.pairs.right,
                                             case.pairs.wrong, unit="head")
    heads = found[[row for row, label in enumerate(labels) if label.startswith("L")]]
    return heads.mean(-1).unflatten(0, case.shape) / GAIN


def ov_scores(case):
    """Whether each head copies (1) or suppresses (-1) what it looks at, by its weights alone."""
    return ov_eigenvalue_score(case.wired.model).nan_to_num()


# The results that tools must give, from the Truth


def shapley_values(truth):
    """The sizes that integrated gradients must give. If two heads play the same part, each gets the
    mean of what it restores when patched first (denoising) and of what it breaks when corrupted
    first (noising)."""
    return {head: (truth.restores.get(head, 0.0) + truth.breaks.get(head, 0.0)) / 2
            for head in truth.heads}


def visible_sizes(truth):
    """The sizes that the gradient must give: a head's whole direct effect, unless it is flat."""
    return {head: size and abs(truth.direct[head]) for head, size in truth.slope.items()}


def steep_edges(truth):
    """The edges through which a gradient passes."""
    return dict.fromkeys(set(truth.edges) - truth.flat)


def kept_edges(truth):
    """The edges that ACDC must keep: if either of two heads is enough, those of one."""
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
    """How much of each earlier head's output is read by each later head's Q or K:
    {(kind, layer, head, later layer, later head): share}."""
    heads = range(case.shape[1])
    shares = {kind: composition_scores(case.wired.model, kind, n_draws=2).scores.nan_to_num()
              for kind in "QK"}
    return {(kind, 0, head, 1, later): shares[kind][0, head, 1, later].item()
            for kind, head, later in itertools.product("QK", heads, heads)}


def eap_scorer(ig_steps):
    """A function that scores edges by EAP, or with more steps by EAP-IG, in units of GAIN."""
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
    """The share of the gap that each head's clean output restores along each direct path."""
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
    """A tool's result on a circuit: its AUROC, the AUROC that follows from the wiring, and the
    largest error of a size (0 if sizes are not compared)."""

    tool: str
    circuit: str
    auroc: float
    wired: float
    error: float


def judge_tool(tool, case):
    """The Row of a tool on a case; None if the tool does not apply to such a circuit."""
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
    """A number that follows from the wiring: measured, wired, and how far apart they may be."""

    measured: float
    wired: float
    within: float

    @property
    def holds(self):
        """Whether the two numbers are close enough."""
        return abs(self.measured - self.wired) <= self.within


def fact(measured, wired, within=0.01):
    """A Fact of plain numbers."""
    return Fact(float(measured), float(wired), within)


def measure_facts(case):
    """{name: Fact} of a case: the facts of every circuit, and those of this one."""
    found = measure_behaviour(case)
    own = OWN_FACTS.get(case.wired.name)
    return found | own(case) if own else found


def answer_accuracy(wired, texts):
    """The share of positions with an answer at which the model predicts it."""
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
    """Facts of every circuit: it does its task, also in another basis and with its edges alone."""
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
    """Facts of the gates: removing both heads costs more (or less) than the sum of removing each.

    Also the OV eigenvalue score, which ignores size: the eigenvalues of a head that writes nothing
    are rounding errors, and score like a perfect copy.
    """
    name = case.wired.name
    heads = sorted(case.wired.truth.heads)
    beyond = -pairwise_interaction(*case.ablation, heads, case.pairs.metric).mean[0, 1] / GAIN
    copies = ov_eigenvalue_score(case.wired.model)
    return {
        f"{name}: cost of removing both heads, beyond that of each":
            fact(beyond, {"OR": 2, "AND": -2}[name]),
        f"{name}: |OV eigenvalue score| of heads without an effect on logits":
            fact(min(abs(copies[head].item()) for head in heads), 1),
    }


def measure_suppression(case):
    """Facts of copy suppression: the predicting head supports the wrong answer directly, and the
    right one through the head that it activates. The gradient and the lens see only the former."""
    early = min(case.wired.truth.heads)
    lens = logit_lens(case.wired.model, case.clean_cache)
    lead = case.pairs.metric(lens.logits).mean(-1) / GAIN
    gone = self_repair(*case.ablation, early, case.pairs.metric)
    facts = {
        "share restored by the predictor": fact(denoising_shares(case)[early], 1),
        "the same by its gradient, whose sign is wrong": fact(slope_shares(case)[early], -1),
        "lead of the answer in the lens, before the suppressor": fact(lead[1], -0.5),
        "lead of the answer in the lens, after it": fact(lead[-1], 0.5),
        "predictor removed, direct effect": fact(gone.direct.mean() / GAIN, 0.5),
        "predictor removed, effect through other heads' patterns":
            fact(gone.by_patterns.mean() / GAIN, -1),
    }
    return {f"copy suppression: {what}": each for what, each in facts.items()}


def measure_saturation(case):
    """Facts of a query that decides where to look: patched, by its gradient, and by the gradient
    after the softmax."""
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
    """Facts of dead heads: sharp patterns, and no effect."""
    restored = by_head(denoising_shares(case))
    dead = [head for head in restored if head not in case.wired.truth.heads]
    pattern = prev_token_score(case.clean_cache["pattern", 0]).mean(0)
    return {
        "dead heads: lowest previous-token score of one":
            fact(min(pattern[head] for _, head in dead), 1, 1e-3),
        "dead heads: largest share that one restores":
            fact(max(abs(restored[head]) for head in dead), 0, 1e-3),
    }


def measure_bits(case):
    """Facts of two bits: a probe reads both, but only erasing one changes the answer.

    What the two bits have in common by chance in these texts is erased with either.
    """
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
