"""What is measured of every head that attention_visualization.py shows: where it looks, what it
writes, and what the loss rises by without it; and what is claimed of them.

    python experiments/attention_visualization.py      # runs it

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Read before: experiments/attention_visualization.py; after: experiments/wired_circuits.py
Source: as there
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from activation_cache import get_act_name
from attention import causal_mask
from experiments.common import Claim, over_seeds
from experiments.wired_board import BOS, CONTENT, N_CTX
from experiments.wired_circuits import previous_token
from head_ablation import ablation_effects, head_importance
from metrics import (
    Effects,
    attention_entropy,
    auroc,
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
NOTHING = 1e-4  # nats: LayerNorm sees, a little, what a head writes where nobody reads


@dataclass(frozen=True)
class Subject:
    """A model that is looked at: tokens [1, pos], the text that is shown; held_out [batch, pos],
    the texts that it is ablated on."""

    name: str
    model: GPT
    tokenizer: object
    tokens: torch.Tensor
    held_out: torch.Tensor


# What is measured


@dataclass(frozen=True)
class Looks:
    """Where every head looks, and what it would write from there.

    pattern: [layer, batch, head, query_pos, key_pos]. written: [layer, batch, head, key_pos], the
    length ‖v W_O‖. stream: [layer, batch, query_pos], the length of the stream that it is added to.
    """

    pattern: torch.Tensor
    written: torch.Tensor
    stream: torch.Tensor

    @property
    def weighed(self):
        """What is written from each key, as a share of the stream: shaped as the pattern."""
        return self.pattern * self.written[..., None, :] / self.stream[:, :, None, :, None]


@torch.no_grad()
def watched(model, tokens):
    """The Looks of a model at tokens, [batch, pos]."""
    layers = range(model.cfg.n_layers)
    names = [get_act_name(name, at) for at in layers for name in ("resid_pre", "pattern", "v")]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens))
    written = [torch.einsum("bphd,hdm->bhpm", cache["v", layer], model.blocks[layer].attn.W_O)
               .norm(dim=-1) for layer in layers]
    return Looks(cache.stack("pattern"), torch.stack(written),
                 cache.stack("resid_pre").norm(dim=-1))


def scores(looks, tokens):
    """{name: [layer, head]}, means over texts; NaN where no token comes twice.

    sharpness: 1 - entropy / that of even attention. written: the sum over keys of `looks.weighed`,
    at least the length of what is added, whose parts may cancel.
    """
    pattern, entropy = looks.pattern, attention_entropy(looks.pattern)
    even = torch.arange(1, pattern.shape[-1] + 1).log().mean()
    values = {
        "previous token": prev_token_score(pattern),
        "duplicate token": duplicate_token_score(pattern, tokens),
        "induction": induction_score(pattern, tokens),
        "first token": sink_score(pattern),
        "entropy": entropy,
        "sharpness": 1 - entropy / even,
        "written": looks.weighed.sum(-1).mean(-1),
    }
    return {name: value.nanmean(1) for name, value in values.items()}


@torch.no_grad()
def kept_z(model, tokens):
    """An ActivationCache that holds every layer's z, the reference of an ablation."""
    names = [get_act_name("z", layer) for layer in range(model.cfg.n_layers)]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens))
    return cache


def effects(model, tokens, mode="mean", *, reference=None, progress=None):
    """What the loss of each text rises by without a head: Effects [layer, head, batch], in nats a
    token.

    reference: texts [row, pos] whose mean takes the head's place; the tokens themselves unless
    given. progress: is called after each head.
    """
    cache = kept_z(model, tokens if reference is None else reference)
    return head_importance(model, tokens, mode=mode, reference=cache, progress=progress)


def silenced(subject, head, mode):
    """[the largest change of the head's pattern, the largest ‖v W_O‖ left, its effect's size] on
    the held-out texts, in a copy of the model in which this head's W_O is 0: all must be 0."""
    (layer, index), mute = head, copy.deepcopy(subject.model)
    with torch.no_grad():
        mute.blocks[layer].attn.W_O[index] = 0
    before, after = (watched(model, subject.held_out) for model in (subject.model, mute))
    effect = ablation_effects(mute, subject.held_out, [[head]], mode=mode,
                              reference=kept_z(mute, subject.held_out)).values
    changed = (before.pattern - after.pattern)[layer, :, index]
    return [each.abs().max().item() for each in (changed, after.written[layer, :, index], effect)]


@dataclass(frozen=True)
class View:
    """All that is known of a Subject's heads.

    looks: on the text that is shown. here, held: {score: [layer, head]} on that text and on the
    held-out ones; effect_here [layer, head] and effects [layer, head, batch] likewise. untrained:
    the best previous-token score of a fresh model of its shape. silenced: as the function gives
    it, of `watcher`, the head (layer, head) with the best one of all.
    """

    subject: Subject
    looks: Looks
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


def view_of(subject, mode="mean", progress=None):
    """The View of a Subject. mode: of ablation, "mean" or "zero". progress: is called after each
    head that was taken away, on the held-out texts and on the one that is shown."""
    model, held_out = subject.model, subject.held_out
    looks, held = watched(model, subject.tokens), scores(watched(model, held_out), held_out)
    watcher = divmod(held["previous token"].argmax().item(), model.cfg.n_heads)
    fresh = GPT(model.cfg).eval()
    untrained = scores(watched(fresh, held_out), held_out)["previous token"].max().item()
    everywhere = effects(model, held_out, mode, progress=progress)
    here = effects(model, subject.tokens, mode, reference=held_out, progress=progress).mean
    return View(subject, looks, scores(looks, subject.tokens), held, here, everywhere,
                untrained, watcher, silenced(subject, watcher, mode))


def head_facts(view):
    """A dict for each head, plain values: its scores on the text and on held-out texts, its effect
    with an interval, and what that says."""
    low, high = view.effects.ci()
    facts = []
    for layer, head in np.ndindex(*low.shape):
        numbers = {name: [float(view.here[name][layer, head]), float(view.held[name][layer, head])]
                   for name in view.here}
        numbers["loss without it"] = [float(view.effect_here[layer, head]),
                                      float(view.effects.mean[layer, head])]
        ends = float(low[layer, head]), float(high[layer, head])
        facts.append({
            "name": f"{layer}.{head}", "layer": layer, "head": head,
            "effect": numbers["loss without it"][1], "low": ends[0], "high": ends[1],
            "verdict": "needed" if ends[0] > 0 else "harmful" if ends[1] < 0 else "idle",
            "scores": {name: [None if np.isnan(x) else round(x, 4) for x in pair]
                       for name, pair in numbers.items()},
            "written": [float(f"{x:.4g}") for x in view.looks.written[layer, 0, head].tolist()],
        })
    return facts


# What is claimed


def wired_views(n=3):
    """[({score: [head]}, needed [head])] of n wirings in which one head that looks one position
    back, a little smeared, is needed, and three that look there sharply are not."""
    found = []
    for seed in range(n):
        wired = previous_token(seed, decoys=True)
        pairs = torch.tensor([[a, b] for a in CONTENT for b in CONTENT if a != b])
        texts = torch.cat([torch.full((len(pairs), 1), BOS), pairs.repeat(1, N_CTX)], 1)[:, :N_CTX]
        values = scores(watched(wired.model, texts), texts)
        values["effect"] = effects(wired.model, texts).mean
        truth = torch.zeros(values["effect"].shape, dtype=torch.bool)
        truth[next(iter(wired.truth.circuit))] = True
        found.append(({name: value.flatten() for name, value in values.items()}, truth.flatten()))
    return found


def known_claims():
    """[Claim] of models whose truth is known, because they were wired by hand."""
    alone = [previous_token(seed) for seed in range(3)]
    texts = torch.tensor([[BOS, *CONTENT[: N_CTX - 1]]])
    best = [prev_token_score(watched(wired.model, texts).pattern).max().item() for wired in alone]
    decoyed = wired_views()
    area = {name: [auroc(values[name], truth) for values, truth in decoyed]
            for name in ("effect", "written", "sharpness", "previous token")}
    idle = [values["effect"][~truth].abs().max().item() for values, truth in decoyed]
    live = np.mean([values["effect"][truth].item() for values, truth in decoyed])
    others = ", ".join(f"{name} {np.mean(area[name]):.2f}" for name in list(area)[1:])
    return [
        over_seeds("wired by hand: previous-token score", best, lambda x: x > 0.999,
                   control="1 by wiring"),
        over_seeds("wired, three idle heads with prettier patterns: AUROC of the effect",
                   area["effect"], lambda x: x == 1, control=f"AUROC by {others}"),
        over_seeds("the same: largest effect of an idle head (nats a token)", idle,
                   lambda x: x < NOTHING, control=f"the needed one's {live:.2f}"),
    ]


def claims_of(views, tested=True):
    """[Claim] of some Views. tested: whether those on what training makes are claimed, or only
    reported."""
    return [*watcher_claims(views, tested), *rank_claims(views, tested),
            over_seeds(
                "a head sharper than the most needed one: its effect, as a share of that one's",
                [idle_share(view) for view in views], (lambda x: x < 0.5) if tested else None,
                control="less than half", mark=0.5),
            *silenced_claims(views), *known_claims()]


def watcher_claims(views, tested):
    """[Claim]: the best previous-token head is one; what the loss needs of it alone is reported,
    since several share the work."""
    best = [view.of_heads("previous token").max().item() for view in views]
    even = prev_token_score(even_pattern(views[0].subject.held_out.shape[1])).item()
    fresh = max(view.untrained for view in views)
    needed = [view.effects.mean[view.watcher].item() for view in views]
    typical = np.mean([view.of_heads("effect").median().item() for view in views])
    lows, highs = ([end[view.watcher].item() for view, end in zip(views, ends, strict=True)]
                   for ends in zip(*(view.effects.ci() for view in views), strict=True))
    interval = (min(needed), max(needed)) if len(views) > 1 else (lows[0], highs[0])
    return [
        over_seeds("the best previous-token head: its score on held-out texts", best,
                   (lambda x: x > 2 * max(even, fresh)) if tested else None,
                   control=f"even attention {even:.3f}; untrained, the best {fresh:.3f}"),
        Claim("what the loss rises by without it (nats a token)", float(np.mean(needed)),
              *interval, control=f"the median head {typical:.3f}"),
    ]


def silenced_claims(views):
    """[Claim]: a head that can't write keeps its pattern, and does nothing."""
    largest = [max(column) for column in zip(*(view.silenced for view in views), strict=True)]
    before = np.mean([view.effects.mean[view.watcher].item() for view in views])
    lines = {"largest change of its pattern": "a pattern needs no W_O",
             "largest ‖v W_O‖": "it writes nothing",
             "its effect": f"with its own W_O {before:.3f}"}
    return [Claim(f"its W_O set to 0: {what}", value, value, value,
                  value == 0 if what == "its effect" else None, control=control)
            for (what, control), value in zip(lines.items(), largest, strict=True)]


def even_pattern(n_pos):
    """Attention spread over all that can be seen: [pos, pos]."""
    visible = causal_mask(n_pos, n_pos).float()
    return visible / visible.sum(-1, keepdim=True)


def idle_share(view):
    """Of the heads that are at least as sharp as the most needed one, the least effect over its."""
    sharp, effect = view.of_heads("sharpness"), view.of_heads("effect")
    return (effect[sharp >= sharp[effect.argmax()]].min() / effect.max()).item()


def rank_claims(views, tested):
    """[Claim]: how far three scores go with what ablation says of the heads of a model: looking at
    the token before does better than chance, sharpness ranks them worse than ablation on other
    texts does; and whether what is written ranks them better than sharpness. None for models of
    fewer than three heads."""
    of = {name: torch.stack([view.of_heads(name) for view in views])
          for name in ("effect", "previous token", *RANKERS)}
    if of["effect"].shape[1] < 3:
        return []
    halves = [torch.stack([view.effects.values[..., half::2].mean(-1).flatten() for view in views])
              for half in (0, 1)]
    known, least, _ = rank_correlation(*halves)
    again = f"effects on one half of the texts with those on the other: {known:.2f}"
    found = [looking_back(of["previous token"], of["effect"], tested)]
    for name, what in RANKERS.items():
        value, low, high = rank_correlation(of[name], of["effect"])
        found.append(Claim(f"rank correlation with the effect, over heads: {what}", value, low,
                           high, high < least if tested and name == "sharpness" else None,
                           control=again))
    nearer = rank_correlation(of["written"], of["effect"], other=of["sharpness"])
    return [*found, Claim("what is written ranks them better than sharpness, by", *nearer,
                          control="0: no better")]


def looking_back(score, effect, tested):
    """The Claim that heads are needed the more, the more they look at the token before: of all
    heads, since those that do so share the work. score, effect: [model, head]."""
    order = torch.rand(2000, *effect.shape, generator=seeded_generator(1)).argsort(-1)
    null = pearson(score, effect.expand(2000, -1, -1).gather(-1, order)).mean(-1)
    each = pearson(score, effect)
    p = permutation_pvalue(each.mean(), null).item()
    return over_seeds("correlation with the effect, over heads: the previous-token score",
                      each.tolist(), p < 0.05 if tested else None,
                      control=f"95 % of shuffled: below {null.quantile(0.95):.2f} (p = {p:.2g})")


def rank_correlation(score, effect, *, other=None):
    """(Spearman correlation, low, high) of a score of each head with its effect, [model, head]: the
    mean over models, each ranked apart, with an interval of 95 % by drawing each one's heads again
    and again; with `other`, how much higher it is than this one's."""
    draws = torch.randint(effect.shape[1], (2000, *effect.shape), generator=seeded_generator(0))
    whole = torch.arange(effect.shape[1]).expand(1, *effect.shape)

    def among(rows):  # [draw]
        def drawn(values):
            return values.expand(len(rows), -1, -1).gather(-1, rows)

        of_score, of_other = (spearman(drawn(each), drawn(effect)) if each is not None else 0.0
                              for each in (score, other))
        return (of_score - of_other).nanmean(-1)  # all heads drawn may be one

    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return among(whole).item(), *torch.nanquantile(among(draws), ends).tolist()
