"""Measure every head: where it looks, what it writes, and how much the loss rises without it.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV); what ablation is: chapter 9
Prerequisites: attention.py
Next: experiments/attention_visualization.py
Source: Kobayashi et al. 2020 (the norm of what is written); Jain & Wallace 2019 (attention is not
explanation)
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from activation_cache import get_act_name, head_label
from attention import causal_mask
from experiments.attention_page.model import AttentionSubject
from experiments.wired.board import BOS, CONTENT, N_CTX
from experiments.wired.model import previous_token
from head_ablation import ablation_effects, head_importance
from metrics import (
    Effects,
    attention_entropy,
    duplicate_token_score,
    induction_score,
    pearson,
    permutation_pvalue,
    prev_token_score,
    sink_score,
    spearman,
)
from model import GPT
from utils import seeded_generator

RANKERS = {"sharpness": "a pattern's sharpness",
           "written": "what is written, as a share of the stream"}
N_DRAWS = 2000  # of a bootstrap or a shuffle

# What heads do in one forward pass


@dataclass(frozen=True)
class AttentionRecord:
    """Where every head looks, and what it would write from there.

    pattern: [layer, batch, head, query_pos, key_pos]. written_norm: [layer, batch, head, key_pos],
    the length ‖v W_O‖. stream_norm: [layer, batch, query_pos], the length of the stream that the
    head adds to.
    """

    pattern: torch.Tensor
    written_norm: torch.Tensor
    stream_norm: torch.Tensor

    @property
    def written_share(self):
        """What the head writes from each key, as a share of the stream; shaped like the pattern."""
        written = self.pattern * self.written_norm[..., None, :]
        return written / self.stream_norm[:, :, None, :, None]


@torch.no_grad()
def record_attention(model, tokens):
    """The AttentionRecord of a model on tokens, [batch, pos]."""
    layers = range(model.cfg.n_layers)
    names = [get_act_name(name, layer) for layer in layers
             for name in ("resid_pre", "pattern", "v")]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens))

    written_norms = []
    for layer in layers:
        moved = torch.einsum("bphd,hdm->bhpm", cache["v", layer], model.blocks[layer].attn.W_O)
        written_norms.append(moved.norm(dim=-1))
    return AttentionRecord(cache.stack("pattern"), torch.stack(written_norms),
                           cache.stack("resid_pre").norm(dim=-1))


def score_heads(record, tokens):
    """{name: [layer, head]}, means over texts; NaN if no token occurs twice.

    sharpness: 1 - entropy / entropy of even attention. written: the sum over keys of
    `record.written_share`; the parts may cancel, so the head adds at most this.
    """
    pattern = record.pattern
    entropy = attention_entropy(pattern)
    even = torch.arange(1, pattern.shape[-1] + 1).log().mean()
    values = {
        "previous token": prev_token_score(pattern),
        "duplicate token": duplicate_token_score(pattern, tokens),
        "induction": induction_score(pattern, tokens),
        "first token": sink_score(pattern),
        "entropy": entropy,
        "sharpness": 1 - entropy / even,
        "written": record.written_share.sum(-1).mean(-1),
    }
    return {name: value.nanmean(1) for name, value in values.items()}


def uniform_pattern(n_pos):
    """Attention spread evenly over all visible keys: [query_pos, key_pos]."""
    visible = causal_mask(n_pos, n_pos).float()
    return visible / visible.sum(-1, keepdim=True)


# The effect of a head: how much the loss rises without it


@torch.no_grad()
def cache_z(model, tokens):
    """An ActivationCache of every layer's z, the reference of an ablation."""
    names = [get_act_name("z", layer) for layer in range(model.cfg.n_layers)]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens))
    return cache


def measure_effects(model, tokens, mode="mean", *, reference_tokens=None, progress=None):
    """The rise of each text's loss without a head: Effects [layer, head, batch], in nats per token.

    reference_tokens: texts [row, pos] whose mean replaces the head's z; None is the tokens
    themselves. progress: called after each head.
    """
    if reference_tokens is None:
        reference_tokens = tokens
    cache = cache_z(model, reference_tokens)
    return head_importance(model, tokens, mode=mode, reference=cache, progress=progress)


def measure_silenced_head(subject, head, mode):
    """Measure a head in a copy of the model where its W_O is 0, on the held-out texts.

    Returns [the largest change of its pattern, the largest ‖v W_O‖, the largest effect]; all must
    be 0.
    """
    layer, index = head
    mute = copy.deepcopy(subject.model)
    with torch.no_grad():
        mute.blocks[layer].attn.W_O[index] = 0

    before = record_attention(subject.model, subject.held_out)
    after = record_attention(mute, subject.held_out)
    changed = (before.pattern - after.pattern)[layer, :, index]
    written = after.written_norm[layer, :, index]
    effect = ablation_effects(mute, subject.held_out, [[head]], mode=mode,
                              reference=cache_z(mute, subject.held_out)).values
    return [each.abs().max().item() for each in (changed, written, effect)]


# All measurements of one model


@dataclass(frozen=True)
class SubjectView:
    """All measurements of the heads of an AttentionSubject.

    record: the AttentionRecord on the text that is shown. here, held: {score: [layer, head]} on
    that text and on the held-out texts; effect_here [layer, head] and effects [layer, head, batch]
    likewise. untrained: the best previous-token score of an untrained model of this shape.
    watcher: the head (layer, head) with the best previous-token score. silenced: what
    `measure_silenced_head` returns for this head.
    """

    subject: AttentionSubject
    record: AttentionRecord
    here: dict
    held: dict
    effect_here: torch.Tensor
    effects: Effects
    untrained: float
    watcher: tuple
    silenced: list

    def of_heads(self, name):
        """A score on the held-out texts, or "effect", of all heads in a row: [head]."""
        return (self.effects.mean if name == "effect" else self.held[name]).flatten()


def view_subject(subject, mode="mean", progress=None):
    """The SubjectView of an AttentionSubject. mode: the kind of ablation, "mean" or "zero".
    progress: called after each ablated head, on the held-out texts and on the text shown."""
    model = subject.model
    held_out = subject.held_out
    record = record_attention(model, subject.tokens)
    held = score_heads(record_attention(model, held_out), held_out)
    watcher = divmod(held["previous token"].argmax().item(), model.cfg.n_heads)

    fresh = GPT(model.cfg).eval()
    fresh_scores = score_heads(record_attention(fresh, held_out), held_out)

    effects = measure_effects(model, held_out, mode, progress=progress)
    effects_here = measure_effects(model, subject.tokens, mode, reference_tokens=held_out,
                                   progress=progress)
    return SubjectView(
        subject, record, here=score_heads(record, subject.tokens), held=held,
        effect_here=effects_here.mean, effects=effects,
        untrained=fresh_scores["previous token"].max().item(), watcher=watcher,
        silenced=measure_silenced_head(subject, watcher, mode))


def describe_heads(view):
    """A dict of plain values for each head: its scores on the text and on held-out texts, its
    effect with an interval, and a verdict ("needed", "idle" or "harmful")."""
    low, high = view.effects.ci()
    heads = []
    for layer, head in np.ndindex(*low.shape):
        numbers = {name: [float(view.here[name][layer, head]), float(view.held[name][layer, head])]
                   for name in view.here}
        effect = float(view.effects.mean[layer, head])
        numbers["loss without it"] = [float(view.effect_here[layer, head]), effect]

        lowest = float(low[layer, head])
        highest = float(high[layer, head])
        if lowest > 0:
            verdict = "needed"
        elif highest < 0:
            verdict = "harmful"
        else:
            verdict = "idle"

        written_norm = view.record.written_norm[layer, 0, head]  # [key_pos]
        heads.append({
            "name": head_label(layer, head), "layer": layer, "head": head,
            "effect": effect, "low": lowest, "high": highest, "verdict": verdict,
            "scores": {name: [None if np.isnan(x) else round(x, 4) for x in pair]
                       for name, pair in numbers.items()},
            "written": [float(f"{x:.4g}") for x in written_norm.tolist()],
        })
    return heads


# The correlation of scores with effects, over the heads of several models


@dataclass(frozen=True)
class HeadRanking:
    """How well three scores predict the effects of heads, over some models.

    looking_back: the correlation of the previous-token score with the effect, [model]; p: its
    p-value; by_chance: the 95 % quantile for shuffled effects. The others are (value, low, high).
    by_score: {score of RANKERS: its rank correlation with the effect}. between_halves: the rank
    correlation of effects on two halves of the texts. written_over_sharpness: the rank correlation
    of what is written minus that of sharpness.
    """

    looking_back: torch.Tensor
    p: float
    by_chance: float
    by_score: dict
    between_halves: tuple
    written_over_sharpness: tuple


def rank_heads(views):
    """The HeadRanking of some SubjectViews; None for models with fewer than three heads."""
    per_head = {name: torch.stack([view.of_heads(name) for view in views])  # [model, head]
                for name in ("effect", "previous token", *RANKERS)}
    effect = per_head["effect"]
    if effect.shape[1] < 3:
        return None

    halves = [torch.stack([view.effects.values[..., half::2].mean(-1).flatten() for view in views])
              for half in (0, 1)]
    each, p, by_chance = correlate_looking_back(per_head["previous token"], effect)
    return HeadRanking(
        each, p, by_chance,
        by_score={name: rank_correlation(per_head[name], effect) for name in RANKERS},
        between_halves=rank_correlation(*halves),
        written_over_sharpness=rank_correlation(per_head["written"], effect,
                                                other=per_head["sharpness"]))


def correlate_looking_back(score, effect):
    """Correlate score and effect over the heads of each model; score, effect: [model, head].

    Returns (correlations [model], p, the 95 % quantile of the mean correlation with shuffled
    effects). All heads count, not only the best, because previous-token heads share the work.
    """
    order = torch.rand(N_DRAWS, *effect.shape, generator=seeded_generator(1)).argsort(-1)
    shuffled = effect.expand(N_DRAWS, -1, -1).gather(-1, order)
    null = pearson(score, shuffled).mean(-1)  # [draw]
    each = pearson(score, effect)
    return each, permutation_pvalue(each.mean(), null).item(), null.quantile(0.95).item()


def rank_correlation(score, effect, *, other=None):
    """(mean, low, high): the Spearman correlation of score and effect over a model's heads,
    averaged over models; the 95 % interval redraws the heads of each model.

    score, effect: [model, head]. other [model, head]: subtract the same correlation for this score.
    """
    n_heads = effect.shape[1]
    all_heads = torch.arange(n_heads).expand(1, *effect.shape)
    draws = torch.randint(n_heads, (N_DRAWS, *effect.shape), generator=seeded_generator(0))

    def correlate(values, heads):  # [draw, model]
        drawn, drawn_effect = (each.expand(len(heads), -1, -1).gather(-1, heads)
                               for each in (values, effect))
        return spearman(drawn, drawn_effect)

    def among(heads):  # [draw]
        found = correlate(score, heads)
        if other is not None:
            found = found - correlate(other, heads)
        return found.nanmean(-1)  # all heads drawn may be one

    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.nanquantile(among(draws), ends).tolist()
    return among(all_heads).item(), low, high


def sharper_head_share(view):
    """The smallest effect among the heads at least as sharp as the most needed head, as a share of
    that head's effect."""
    sharp = view.of_heads("sharpness")
    effect = view.of_heads("effect")
    sharper = sharp >= sharp[effect.argmax()]
    return (effect[sharper].min() / effect.max()).item()


# Models wired by hand, whose truth is known


def measure_wired_decoys(n=3):
    """[({score: [head]}, needed [head])] of n wirings with decoys.

    In each, one previous-token head with a slightly blurred pattern is needed; three others with
    sharp patterns are not.
    """
    pairs = torch.tensor([[a, b] for a in CONTENT for b in CONTENT if a != b])
    start = torch.full((len(pairs), 1), BOS)
    texts = torch.cat([start, pairs.repeat(1, N_CTX)], 1)[:, :N_CTX]

    found = []
    for seed in range(n):
        wired = previous_token(seed, decoys=True)
        values = score_heads(record_attention(wired.model, texts), texts)
        values["effect"] = measure_effects(wired.model, texts).mean
        needed = torch.zeros(values["effect"].shape, dtype=torch.bool)
        needed[next(iter(wired.truth.heads))] = True
        found.append(({name: value.flatten() for name, value in values.items()}, needed.flatten()))
    return found


def score_wired_heads(n=3):
    """[the best previous-token score] of n wirings that have one previous-token head."""
    texts = torch.tensor([[BOS, *CONTENT[: N_CTX - 1]]])
    patterns = [record_attention(previous_token(seed).model, texts).pattern for seed in range(n)]
    return [prev_token_score(pattern).max().item() for pattern in patterns]
