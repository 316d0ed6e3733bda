"""Measure features beside random directions, and write the page that shows them.

The contexts in which a feature is strongest nearly always look alike, but so do those of any
direction. So everything that the page shows of a feature, it also shows of a random direction that
is as long and active as often:

    z = relu(x · direction - b)      b: chosen so that as many held-out positions are above 0

Such a z is smaller than a feature's, so removing it removes less. Its effect on the loss is
therefore measured a second time, with z multiplied so that its mean equals the feature's.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/trained/measure.py
Next: experiments/dictionaries/transcoders/model.py
Source: Bricken et al. 2023 (a feature's contexts, logits and neuron); Bolukbasi et al. 2021 (the
strongest contexts of a direction mislead); Heap et al. 2025 (controls that are not learned)
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments import common
from experiments.dictionaries.model import seed_for, unit_rows
from losses import next_token_loss
from metrics import Effects, Metric, mean_ranks, pearson
from rerun import Rerun
from utils import UserError, seeded_generator
from weight_circuits import read_through

TEMPLATE = Path(__file__).with_name("page.html")
STREAM = re.compile(r"hook_(pos_)?embed|blocks\.\d+\.hook_(resid_\w+|attn_out|mlp_out)")
NEURONS = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")
BEFORE = 10  # tokens of a context before its strongest one
AFTER = 4
N_MIDDLE = 3  # contexts from the middle of a direction's activations
N_BINS = 24  # of a histogram
N_TOKENS = 6  # that a direction raises, and as many that it lowers
MOST_CELLS = 8  # directions that are removed at once


# Directions, and their activations on the held-out texts


@dataclass(frozen=True)
class Directions:
    """Some directions, and their activations at every held-out position.

    vectors: [direction, d]. z: [direction, batch, pos], 0 where a direction is not active.
    """

    vectors: torch.Tensor
    z: torch.Tensor

    def select(self, chosen):
        """The Directions with the numbers `chosen` [n]."""
        return Directions(self.vectors[chosen], self.z[chosen])


def dictionary_directions(dictionary, x):
    """The Directions of all latents of a dictionary; x: [batch, pos, d]."""
    return Directions(dictionary.W_dec.detach(), dictionary.encode(x).movedim(-1, 0))


def random_directions(x, like, drawn):
    """The Directions of some drawn vectors, each as long and active as often as one of `like`.

    drawn: [direction, d]; x: [batch, pos, d]. Only ties can make one active less often.
    """
    vectors = unit_rows(drawn) * like.vectors.norm(dim=-1, keepdim=True)

    readings = vectors @ x.flatten(0, 1).T  # [direction, position]
    n_active = (like.z > 0).flatten(1).sum(-1, keepdim=True)  # [direction, 1]
    strongest_first = readings.sort(-1, descending=True).values
    b = strongest_first.gather(-1, n_active.clamp(max=readings.shape[-1] - 1))
    return Directions(vectors, (readings - b).relu().view(like.z.shape))


def as_strong(directions, like):
    """The directions, with z multiplied so that its mean equals that of `like`."""
    ratio = like.z.mean((1, 2)) / directions.z.mean((1, 2))
    return Directions(directions.vectors, directions.z * ratio.nan_to_num(posinf=0)[:, None, None])


# The model around them


@dataclass(frozen=True)
class Surroundings:
    """The activations, neurons and LayerNorm scale of one run, which directions are compared with.

    x: [batch, pos, d], at the subject's hook point. scale: the mean scale by which the last
    LayerNorm divides. neurons: [neuron], names such as L0N12, of those whose writes reach the hook
    point; neuron_vectors: [neuron, d], what each writes there; neuron_z: [neuron, batch, pos].
    """

    x: torch.Tensor
    scale: float
    neurons: list
    neuron_vectors: torch.Tensor
    neuron_z: torch.Tensor


@torch.no_grad()
def look_around(subject):
    """The Surroundings of a Subject, from one run on its held-out texts."""
    model = subject.model
    layers = neuron_layers(model, subject.at)
    posts = [f"blocks.{layer}.mlp.hook_post" for layer in layers]
    has_norm = model.cfg.norm != "none"
    names = {subject.at, *posts} | ({"ln_final.hook_scale"} if has_norm else set())
    _, cache = model.run_with_cache(subject.held_out, list(names))
    x = cache[subject.at]

    # at hook_post a neuron is a dimension of its own, in the stream a row of W_out
    if NEURONS.fullmatch(subject.at):
        vectors = [torch.eye(model.cfg.d_mlp)]
    else:
        vectors = [model.blocks[layer].mlp.W_out for layer in layers]
    return Surroundings(
        x=x,
        scale=cache["ln_final.hook_scale"].mean().item() if has_norm else 1.0,
        neurons=[f"L{layer}N{n}" for layer in layers for n in range(model.cfg.d_mlp)],
        neuron_vectors=torch.cat(vectors) if layers else x.new_empty(0, x.shape[-1]),
        neuron_z=torch.cat([cache[post].movedim(-1, 0) for post in posts]) if layers
        else x.new_empty(0, *x.shape[:-1]))


def neuron_layers(model, at):
    """The layers whose neurons' writes reach a hook point."""
    is_neurons = NEURONS.fullmatch(at)
    if is_neurons:
        return [int(is_neurons[1])]
    if model.cfg.attn_only or not at.startswith("blocks.") or not STREAM.fullmatch(at):
        return []
    layer = int(at.split(".")[1])
    after_the_mlp = at.endswith(("mlp_out", "resid_post"))
    return list(range(layer + after_the_mlp))


def writes_to_stream(model, at, vectors):
    """Where and what the vectors [direction, d] of `at` write: (hook point, [direction, d_model]).

    Neurons write through W_out. So removing a direction from hook_post is the same as removing its
    product with W_out from the MLP's output. Returns (at, None) if `at` is not part of the stream.
    """
    is_neurons = NEURONS.fullmatch(at)
    if is_neurons:
        mlp = model.blocks[int(is_neurons[1])].mlp
        return f"blocks.{is_neurons[1]}.hook_mlp_out", vectors @ mlp.W_out
    return at, vectors if STREAM.fullmatch(at) else None


# What is measured of each direction


@torch.no_grad()
def removal_effects(subject, directions):
    """By how much the loss rises if z · direction is subtracted from the activation everywhere.

    Returns Effects [direction, batch], in nats a token.
    """
    model, texts = subject.model, subject.held_out
    point, writes = writes_to_stream(model, subject.at, directions.vectors)
    writes = directions.vectors if writes is None else writes
    loss = Metric(lambda logits: next_token_loss(logits, texts, reduction="none"))
    rerun = Rerun(model, texts, loss, names=[point])

    rises = []
    for cells in torch.arange(len(writes)).split(min(MOST_CELLS, rerun.cells_at_once())):
        removed = directions.z[cells, ..., None] * writes[cells, None, None]
        [losses] = rerun.patched([(point, rerun.cache[point] - removed)])  # [cell, batch]
        rises.append(losses - rerun.baseline)
    return Effects(torch.cat(rises), ("direction",))


@torch.no_grad()
def direct_logits(subject, directions, scale):
    """The direct effect of one unit of each direction on the logits, [direction, d_vocab].

    It is the effect past all later blocks, less its mean over the vocabulary; None if the hook
    point is not part of the stream. scale: by which the last LayerNorm divides.
    """
    _, writes = writes_to_stream(subject.model, subject.at, directions.vectors)
    if writes is None:
        return None
    logits = writes @ read_through(subject.model.ln_final, subject.model.W_U) / scale
    return logits - logits.mean(-1, keepdim=True)


def variable_aurocs(directions, variables):
    """`metrics.auroc` of each direction for each known variable, [direction, variable].

    All are computed together, so each direction is ranked only once. NaN for a variable that is
    true everywhere or nowhere.
    """
    scores = directions.z.flatten(1).double()
    truth = torch.stack(list(variables.values())).flatten(1).double()  # [variable, position]
    n_true = truth.sum(-1)
    above = mean_ranks(scores) @ truth.T - n_true * (n_true - 1) / 2
    return above / (n_true * (truth.shape[-1] - n_true))


def nearest_neurons(directions, around):
    """The neuron that writes most nearly in each direction: [{"name", "cosine", "correlation"}].

    correlation: of the neuron's activation and z. [None] * n if no neuron writes there.
    """
    if not around.neurons:
        return [None] * len(directions.vectors)
    cosines = F.normalize(directions.vectors, dim=-1) @ F.normalize(around.neuron_vectors, dim=-1).T
    best, which = cosines.max(-1)
    correlations = pearson(directions.z.flatten(1), around.neuron_z[which].flatten(1))
    return [{"name": around.neurons[n], "cosine": cosine, "correlation": correlation}
            for n, cosine, correlation in
            zip(which.tolist(), best.tolist(), correlations.nan_to_num().tolist(), strict=True)]


# Contexts


def strongest_places(z, n):
    """The place (text, pos) of the largest activation in each of the n texts with the largest.

    z: [batch, pos].
    """
    values, pos = z.max(-1)
    texts = values.argsort(descending=True, stable=True)[:n].tolist()
    return [(text, pos[text].item()) for text in texts if values[text] > 0]


def middle_places(z, n, but):
    """The places (text, pos) of n texts where z is nearest to the median of all z above 0.

    z: [batch, pos]. but: the texts to leave out.
    """
    text, pos = (z > 0).nonzero(as_tuple=True)
    values = z[text, pos]
    places = []
    seen = set(but)
    for k in (values - values.median()).abs().argsort(stable=True).tolist():
        if len(places) < n and text[k].item() not in seen:
            places.append((text[k].item(), pos[k].item()))
            seen.add(text[k].item())
    return places


def context(subject, z, place):
    """The tokens around a place (text, pos), with z [batch, pos] at each, as plain values.

    "at": the number of the token at pos.
    """
    text, pos = place
    start = max(0, pos - BEFORE)
    window = slice(start, pos + AFTER + 1)
    ids = subject.held_out[text, window].tolist()
    return {"tokens": subject.tokenizer.to_str_tokens(ids, show_unknown=True),
            "z": z[text, window].tolist(), "at": pos - start}


# Everything, as plain values


def describe_features(subject, dictionary, *, n_features=100, n_contexts=8, seed=0):
    """Measure the features with the largest effects on the loss, and a random direction for each.

    subject: a Subject; all numbers are measured on its held-out texts. dictionary: of the
    activations at its hook point. n_features: how many at most. seed: of the random directions; a
    latent's partner does not depend on which others are shown.

    Returns [{"index": the latent's number, "feature": {...}, "random": {...}}], the largest effect
    first. Both hold what `describe_directions` returns. The random one also has "as_much": its
    effect if as much of it is removed, on average, as of the feature.
    Raises UserError for a dictionary of other activations, and if none of its latents is ever
    active.
    """
    around = look_around(subject)
    widths = {len(dictionary.W_enc), dictionary.W_dec.shape[-1]}
    if widths != {around.x.shape[-1]}:
        raise UserError(f"the dictionary reads and writes {sorted(widths)} numbers, and "
                        f"{subject.at} has {around.x.shape[-1]}; pass one of these activations")

    # the features with the largest effects, among those that are ever active
    latents = dictionary_directions(dictionary, around.x)
    alive = latents.z.flatten(1).any(-1).nonzero().flatten()
    if len(alive) == 0:
        raise UserError("no latent is active on the held-out texts; train the dictionary longer")
    effects = removal_effects(subject, latents.select(alive))
    largest = effects.mean.abs().argsort(descending=True, stable=True)[:n_features]
    shown = alive[largest]

    # a random direction for each
    chosen = latents.select(shown)
    generator = seeded_generator(seed_for("random partners", seed))
    drawn = torch.randn(latents.vectors.shape, generator=generator)[shown]
    partners = random_directions(around.x, chosen, drawn)
    partner_effects = removal_effects(subject, partners)
    as_much_effects = removal_effects(subject, as_strong(partners, chosen))

    described = zip(
        shown.tolist(),
        describe_directions(subject, chosen, around, Effects(effects.values[largest]), n_contexts),
        describe_directions(subject, partners, around, partner_effects, n_contexts),
        describe_effects(as_much_effects), strict=True)
    return [{"index": index, "feature": feature, "random": partner | {"as_much": as_much}}
            for index, feature, partner, as_much in described]


def describe_directions(subject, directions, around, effects, n_contexts):
    """A dict of plain values for each direction, in a list.

    frequency: the share of positions at which it is active. mean, most: of z, where it is active.
    effect, low, high: the rise of the loss without it, in nats a token, with an interval of 95 %
    over texts. counts: how many positions have z in each of N_BINS equal parts from 0 to `most`.
    strongest, middle: contexts. raised, lowered: [[token, logits a unit]], or None if the direction
    does not write to the stream. neuron: the nearest one, or None. variable: the known variable
    that the direction predicts best, with its AUROC, or None.
    """
    logits = direct_logits(subject, directions, around.scale)
    neurons = nearest_neurons(directions, around)
    aurocs = variable_aurocs(directions, subject.variables) if subject.variables else None

    described = []
    for k, (z, effect) in enumerate(zip(directions.z, describe_effects(effects), strict=True)):
        active = z[z > 0]
        strongest = strongest_places(z, n_contexts)
        middle = middle_places(z, N_MIDDLE, {text for text, _ in strongest})
        described.append(effect | {
            "frequency": len(active) / z.numel(),
            "mean": active.mean().item() if len(active) else 0.0,
            "most": z.max().item(),
            "counts": torch.histc(active, N_BINS, 0, z.max().item()).int().tolist()
            if len(active) else [0] * N_BINS,
            "strongest": [context(subject, z, place) for place in strongest],
            "middle": [context(subject, z, place) for place in middle],
            "raised": None if logits is None else top_tokens(subject, logits[k]),
            "lowered": None if logits is None else top_tokens(subject, -logits[k], sign=-1),
            "neuron": neurons[k],
            "variable": None if aurocs is None else best_variable(subject, aurocs[k]),
        })
    return described


def describe_effects(effects):
    """The means of Effects [direction, batch] with intervals: [{"effect", "low", "high"}]."""
    ends = zip(effects.mean.tolist(), *(end.tolist() for end in effects.ci()), strict=True)
    return [{"effect": mean, "low": low, "high": high} for mean, low, high in ends]


def top_tokens(subject, values, sign=1):
    """The tokens with the largest of the values [d_vocab]: [[token, sign · value]]."""
    top, ids = values.topk(min(N_TOKENS, len(values)))
    texts = subject.tokenizer.to_str_tokens(ids.tolist(), show_unknown=True)
    return [[text, sign * value] for text, value in zip(texts, top.tolist(), strict=True)]


def best_variable(subject, aurocs):
    """The known variable with the highest AUROC: {"name", "auroc"}, or None. aurocs: [variable]."""
    if aurocs.isnan().all():
        return None
    best = aurocs.nan_to_num(-1.0).argmax().item()
    return {"name": list(subject.variables)[best], "auroc": aurocs[best].item()}


# The file


def make_page(subject, dictionary, features):
    """The contents of the page: plain values with four digits. features: of `describe_features`."""
    n_latents = len(dictionary.W_dec)
    n_texts, length = subject.held_out.shape
    randoms = [each["random"] for each in features]
    n_features = count_needed([each["feature"] for each in features])
    n_random = count_needed(randoms)
    n_as_much = count_needed([each["as_much"] for each in randoms])

    direct = ("“Raises” and “lowers” are direct: what a unit of the direction adds to the logits "
              "past all later blocks, less the mean over all tokens.")
    if randoms[0]["raised"] is None:
        direct = (f"{subject.at} is not part of the stream, so it has no direct effects on "
                  "logits.")
    return {
        "title": "Each feature of a dictionary, beside a random direction",
        "about": f"A dictionary of {n_latents} latents, of {subject.name} at {subject.at}. The "
                 f"{len(features)} whose removal changes the loss most are listed; "
                 f"{n_latents - len(features)} are left out. Removing a listed feature clearly "
                 f"raises the loss for {n_features} of them. Removing a random direction does so "
                 f"for {n_random} of as many, or for {n_as_much} if as much is removed as of the "
                 "features.",
        "reading": "Choose a feature: the more colour a token has, the stronger the feature is at "
                   "it. Then look at the random direction beside it, which is active as often: if "
                   "its contexts look as meaningful, the feature’s prove little.",
        "measured": f"All numbers are from {n_texts} held-out texts of {length} tokens. Effect: "
                    "how much the loss rises, in nats a token, if the direction’s part of the "
                    "activation is removed and the rest stays. With intervals of 95 % over texts: "
                    "● needed, the interval lies above 0; ○ unclear, it includes 0; ▼ harmful, it "
                    "lies below. Features are chosen by their effect on these texts, random "
                    f"directions are not chosen. {direct}",
        "features": common.rounded(features),
    }


def count_needed(effects):
    """The number of effects, {"low", ...}, whose interval lies above 0."""
    return sum(each["low"] > 0 for each in effects)


def write_page(path, page):
    """Write the page: the template beside this file, with its contents inside."""
    common.write_page(path, TEMPLATE, page)
