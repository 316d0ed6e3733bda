"""Measure transcoders of a model that names who is given a thing.

A gift is "When Ada and Mia went to the park, Ada gave a kite to". The answer is the receiver's
logit less the giver's. Both MLPs get a transcoder.

Three things can go wrong, and each has its own number.
1. The transcoder misses part of its MLP: the share of the error nodes.
2. After a feature is removed, the MLPs respond in another way than the transcoders say: predicted
   against measured effects with patterns and scales kept, while the MLPs run freely.
3. The frozen parts would have changed: predicted against measured effects with nothing kept.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/scoreboard/model.py, experiments/dictionaries/transcoders/model.py
Next: experiments/dictionaries/transcoders/report.py
Source: Dunefsky et al. 2024; Marks et al. 2024; Ameisen et al. 2025
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

import corpus
from experiments.dictionaries.measure import explained_variance
from experiments.dictionaries.model import DictionaryRecipe
from experiments.dictionaries.transcoders.model import (
    FrozenRun,
    fit_transcoder,
    read_and_written,
    transcoder_quality,
)
from experiments.indirect_object.model import GiftRecipe, gift_text
from experiments.scoreboard.model import GIFT_CHARACTERS, load_gifts
from experiments.wired.model import Pairs
from metrics import Metric, pearson
from model import GPT
from utils import seeded_generator

RECIPE = DictionaryRecipe("TopK", 16, 256, steps=400, dead_after=50)
HELD_OUT = 40_000  # characters of another text
QUICK_WINDOWS = 100  # of text, in a quick run
STRONGEST = 3  # features of a layer and a prompt whose incoming edges are summed
DRAWS = 200  # of shuffled features
SHOWN = 4  # gifts whose effects are kept for the figure
FREE = ("patterns and scales", "scales", "patterns", "nothing")  # what is kept while MLPs run


@dataclass(frozen=True)
class GiftSubject:
    """A model of the corpus, its texts, and the gifts whose answers are split.

    tokens, held_out: [batch, pos], to fit transcoders on and to measure them on. pairs: the gifts.
    """

    model: GPT
    tokens: torch.Tensor
    held_out: torch.Tensor
    pairs: Pairs

    def prompts(self):
        """Yield (tokens [1, pos], metric) of each gift."""
        for tokens, right, wrong in zip(self.pairs.clean_tokens, self.pairs.right,
                                        self.pairs.wrong, strict=True):
            yield tokens[None], Metric.logit_diff(right, wrong)


def load_gift_subject(cfg, folder, seed, trainings=None):
    """The GiftSubject of a seed, with the circuit scoreboard's model, trained if it was not kept.

    cfg: has out_dir, prompts (how many), quick and retrain. folder: for the model of a quick run.
    trainings: the Trainings that this model is among.
    """
    home = folder / "quick" if cfg.quick else Path(cfg.out_dir) / "circuit_scoreboard"
    scored = load_gifts(cfg, home, seed, trainings)
    n_ctx = scored.model.cfg.n_ctx
    ids, tokenizer = gift_text(GiftRecipe(characters=GIFT_CHARACTERS))
    other = torch.tensor(tokenizer.encode(corpus.text(HELD_OUT, seed=1)))
    most = QUICK_WINDOWS if cfg.quick else None
    return GiftSubject(scored.model, windows(ids, n_ctx)[:most], windows(other, n_ctx)[:most],
                       scored.pairs)


def windows(ids, n_ctx):
    """A text, ids [n], cut into windows, [batch, pos]; an incomplete one at the end is dropped."""
    return ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx)


def measure_transcoders(subject, seed, recipe=RECIPE):
    """Fit transcoders to all MLPs of a GiftSubject and measure them: a dict of plain values.

    quality: of `transcoder_quality`, on held-out text. linear: {layer: the share of the variance
    that the best linear map explains}. gifts: of `measure_gift_answers`. untrained: quality and
    gifts of transcoders before training, the latter only with patterns and scales kept.
    """
    result = {"seed": seed}
    layers = range(subject.model.cfg.n_layers)
    for name, how, kept in (("trained", recipe, FREE),
                            ("untrained", replace(recipe, steps=0), FREE[:1])):
        transcoders = {layer: fit_transcoder(subject.model, subject.tokens, layer, how, seed)
                       for layer in layers}
        result[name] = {
            "quality": transcoder_quality(subject.model, transcoders, subject.held_out),
            "gifts": measure_gift_answers(subject, transcoders, seed, kept),
        }
    linear = {layer: explained_by_linear_map(subject, layer) for layer in layers}
    return result.pop("trained") | result | {"linear": linear}


def explained_by_linear_map(subject, layer):
    """The share of an MLP's variance on held-out text that a linear map of its input explains."""
    reading, written = (each.flatten(0, 1) for each in
                        read_and_written(subject.model, subject.tokens, layer))
    mean_read = reading.mean(0)
    mean_written = written.mean(0)
    map_ = torch.linalg.lstsq(reading - mean_read, written - mean_written).solution
    reading, written = (each.flatten(0, 1) for each in
                        read_and_written(subject.model, subject.held_out, layer))
    return explained_variance(written, (reading - mean_read) @ map_ + mean_written)


def measure_gift_answers(subject, transcoders, seed, ways=FREE):
    """Split the answers of all gifts, and compare predicted with measured effects: a dict.

    ways: what is kept while effects are measured, of FREE; "patterns and scales" is among them.

    answer: the mean answer, in nats. shares: the mean share of it that each of "tokens",
    "positions", "features", "errors" and "biases" adds. error_share: the mean of
    Contributions.error_share.
    gaps: the largest errors over all gifts, each close to 0. "answer": of the sum over all nodes;
    "incoming": of the sums of the edges into the STRONGEST features of each layer; "direct" and
    "total": of effects predicted in the linear model, against measured ones.
    r: {way: {layer: the correlation of predicted and measured total effects, over the features of
    all gifts}}. slope: likewise, the slope of measured against predicted effects, through 0; it is
    1 if they are as large as predicted. r_direct: as r, {layer: ...}, for direct effects with
    patterns and scales kept. null: {layer: the 95 % quantile of r with features shuffled within
    each gift}. effects: {layer: {"total" or way: the predicted or measured effects of the features
    of SHOWN gifts}}.
    """
    runs = [FrozenRun(subject.model, transcoders, *prompt) for prompt in subject.prompts()]
    parts = [run.contributions() for run in runs]
    gaps = {"answer": max(abs(each.sum() - run.value)
                          for run, each in zip(runs, parts, strict=True)),
            "incoming": 0.0, "direct": 0.0, "total": 0.0}

    r = {way: {} for way in ways}
    slope = {way: {} for way in ways}
    found = {"r_direct": {}, "null": {}, "effects": {}}
    for layer in transcoders:
        # each feature's effect on each answer: predicted, and measured in several ways
        effects = {name: [] for name in ("total", "direct", "features", "writes", *ways)}
        for run, direct in zip(runs, parts, strict=True):
            places = run.active_places(layer)
            here = places[:, 1], places[:, 2]
            total = run.total_effects()[layer][here]
            effects["total"].append(total)
            effects["direct"].append(direct.features[layer][here])
            for way in ("features", "writes", *ways):
                effects[way].append(run.removal_effects(places, way))
            strongest = places[total.abs().argsort(descending=True)[:STRONGEST]]
            gaps["incoming"] = max([gaps["incoming"], *incoming_gaps(run, strongest)])

        # predicted against measured
        of_all = {name: torch.cat(values) for name, values in effects.items()}
        for predicted, way in (("direct", "writes"), ("total", "features")):
            gap = (of_all[predicted] - of_all[way]).abs().max().item()
            gaps[predicted] = max(gaps[predicted], gap)
        for way in ways:
            r[way][layer] = pearson(of_all["total"], of_all[way]).item()
            slope[way][layer] = slope_through_0(of_all["total"], of_all[way])
        measured = of_all["patterns and scales"]
        found["r_direct"][layer] = pearson(of_all["direct"], measured).item()
        found["null"][layer] = shuffled_r(effects["total"], measured, seed)
        found["effects"][layer] = {name: torch.cat(effects[name][:SHOWN]).tolist()
                                   for name in ("total", *ways)}

    return {"answer": fmean(run.value for run in runs), "gaps": gaps, "r": r, "slope": slope,
            "shares": mean_shares(parts), "error_share": fmean(each.error_share for each in parts),
            **found}


def slope_through_0(predicted, measured):
    """The slope of a line through 0, by least squares. predicted, measured: [n]."""
    return (predicted @ measured / (predicted @ predicted)).item()


def incoming_gaps(run, places):
    """The error of the sum of edges and biases into a feature, for each of places [n, 3]."""
    gaps = []
    for layer, pos, latent in places.tolist():
        pre = run.transcoders[layer].pre(run.reading(layer))[pos, latent].item()
        gaps.append(abs(run.incoming(layer, pos, latent).sum() - pre))
    return gaps


def mean_shares(parts):
    """The mean share of the answer that each kind of node adds; the shares sum to 1."""
    kinds = {
        "tokens": lambda each: each.tokens.sum().item(),
        "positions": lambda each: each.positions.sum().item(),
        "features": lambda each: sum(part.sum().item() for part in each.features.values()),
        "errors": lambda each: sum(part.sum().item() for part in each.errors.values()),
        "biases": lambda each: sum(each.biases.values()),
    }
    return {kind: fmean(total(each) / each.value for each in parts)
            for kind, total in kinds.items()}


def shuffled_r(predicted, measured, seed):
    """The 95 % quantile of r if each gift's predictions are shuffled among its features.

    predicted: a list of [feature], one for each gift; measured: [n], those of all gifts in a row.
    """
    generator = seeded_generator(seed)
    draws = [torch.cat([each[torch.randperm(len(each), generator=generator)]
                        for each in predicted]) for _ in range(DRAWS)]
    return pearson(torch.stack(draws), measured.expand(DRAWS, -1)).quantile(0.95).item()
