"""Transcoders of a word model that names who is given a thing: what is measured, and claimed.

A gift is "When Ada and Mia went to the park, Ada gave a kite to"; the answer is how much higher the
logit of the receiver is than that of the giver. Both MLPs get a transcoder.

Three things can go wrong, and each has its own number. The transcoder misses part of its MLP: the
error nodes' share. What it finds is not what the MLP does once a feature is gone: predicted against
measured effects with patterns and scales kept, where the MLPs are free to answer as they do. And
the frozen parts move: the same with nothing kept.

Thresholds were chosen on seeds 0 to 2, before seeds 10 to 14 were looked at. A correlation of 0.9
with nothing kept was hoped for and is not there, so that line has no verdict. Of the last MLP's
features the last LayerNorm's scale is all that is missing: one feature is much of that stream, and
without it the rest is made larger. Of the first MLP's, scales and patterns both are. (That the
scales are the larger part did not hold for one of seeds 0 to 2, and is not claimed.) The slope with
patterns and scales kept was to lie between 0.9 and 1.1; with other first directions of the
dictionaries it is 1.14 for one seed, so it is shown and not judged.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/transcoder.py, experiments/scoreboard/model.py
Next: experiments/sparse_autoencoder.py
Source: Dunefsky et al. 2024; Marks et al. 2024; Ameisen et al. 2025
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

import corpus
from experiments.common import add_control, mean_text, seed_claim
from experiments.dictionaries.measure import explained_variance
from experiments.dictionaries.model import DictionaryRecipe
from experiments.dictionaries.transcoder import (
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
from plotting import COLOURS, bare_axes
from utils import seeded_generator

RECIPE = DictionaryRecipe("TopK", 16, 256, steps=400, dead_after=50)
HELD_OUT = 40_000  # characters of another text
QUICK_WINDOWS = 100  # of text, where one only wants to see that it runs
STRONGEST = 3  # features of a layer and a prompt whose incoming edges are summed
DRAWS = 200  # of shuffled features
SHOWN = 4  # gifts whose effects are kept for the figure
FREE = ("patterns and scales", "scales", "patterns", "nothing")  # kept, while MLPs are free


# Measured


@dataclass(frozen=True)
class GiftSubject:
    """A model of the corpus; texts to fit transcoders on and to test them on, [batch, pos]; and
    the gifts whose answers are taken apart."""

    model: GPT
    tokens: torch.Tensor
    held_out: torch.Tensor
    pairs: Pairs

    def prompts(self):
        """Yields (tokens [1, pos], metric) of each gift."""
        for tokens, right, wrong in zip(self.pairs.clean_tokens, self.pairs.right,
                                        self.pairs.wrong, strict=True):
            yield tokens[None], Metric.logit_diff(right, wrong)


def load_gift_subject(cfg, folder, seed):
    """The GiftSubject of a seed: the circuit scoreboard's model, made where it is not kept.

    cfg: with out_dir, prompts (how many), quick and retrain. folder: of a quick run's own model.
    """
    home = folder / "quick" if cfg.quick else Path(cfg.out_dir) / "circuit_scoreboard"
    scored = load_gifts(cfg, home, seed)
    n_ctx = scored.model.cfg.n_ctx
    ids, tokenizer = gift_text(GiftRecipe(characters=GIFT_CHARACTERS))
    other = torch.tensor(tokenizer.encode(corpus.text(HELD_OUT, seed=1)))
    most = QUICK_WINDOWS if cfg.quick else None
    return GiftSubject(scored.model, windows(ids, n_ctx)[:most], windows(other, n_ctx)[:most],
                       scored.pairs)


def windows(ids, n_ctx):
    """A text [n] as [batch, pos], without what is left at its end."""
    return ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx)


def measure_transcoders(subject, seed, recipe=RECIPE):
    """What the transcoders of all MLPs of a GiftSubject keep and say: a dict of plain values.

    quality: of `transcoder_quality`, on held-out text. linear: {layer: the share of the variance
    that the best linear map explains}. gifts: of `measure_gift_answers`. untrained: quality and
    gifts of transcoders before training, these with patterns and scales kept alone.
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
    """The answers of all gifts, taken apart: a dict.

    ways: what is kept while effects are measured, of FREE; "patterns and scales" is among them.
    answer: their mean. gaps: the largest difference, over gifts, of sums and what they must be
    ("answer", "incoming": of the STRONGEST features of each layer), and of effects that are
    predicted and measured in the linear model ("direct", "total"). shares: of the answer, the mean
    of what "tokens", "positions", "features", "errors", "biases" add. error_share: the mean of
    Contributions.error_share. r: {way: {layer: predicted total effects against measured ones, over
    the features of all gifts}}; slope: likewise, of measured by predicted effects, through 0: 1
    where they are as large; r_direct: the same of direct effects, with patterns and scales
    kept. null: {layer: what 95 % of r are below with features shuffled within a gift}. effects:
    {layer: {"total" or way: effects of the features of SHOWN gifts, predicted or measured}}.
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

        # compared
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
    """By how much measured grows with predicted, [n] each: least squares of a line through 0."""
    return (predicted @ measured / (predicted @ predicted)).item()


def incoming_gaps(run, places):
    """By how much edges and biases miss a feature's pre-activation, for each of places [n, 3]."""
    gaps = []
    for layer, pos, latent in places.tolist():
        pre = run.transcoders[layer].pre(run.reading(layer))[pos, latent].item()
        gaps.append(abs(run.incoming(layer, pos, latent).sum() - pre))
    return gaps


def mean_shares(parts):
    """The mean share of the answer that each kind of node adds; together 1."""
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
    """What 95 % of r are below where each gift's predictions are shuffled among its features.

    predicted: a list of [feature]; measured: all of them in a row.
    """
    generator = seeded_generator(seed)
    draws = [torch.cat([each[torch.randperm(len(each), generator=generator)]
                        for each in predicted]) for _ in range(DRAWS)]
    return pearson(torch.stack(draws), measured.expand(DRAWS, -1)).quantile(0.95).item()


# Claimed


def transcoder_claims(results, judged=True):
    """[Claim] on what `measure_transcoders` gave of each seed. judged: False leaves open those that
    training may fail; sums are exact in any case."""
    return [*sum_claims(results), *quality_claims(results, judged),
            *effect_claims(results, judged)]


def sum_claims(results):
    """What must hold whatever the transcoder is."""
    def gap(name):
        return lambda one: one["gifts"]["gaps"][name]

    return [
        seed_claim("gifts: nodes' sum less the answer, largest (nats)", results, gap("answer"),
                   below=1e-4),
        seed_claim("… incoming edges and bias less a feature's pre-activation, largest", results,
                   gap("incoming"), below=1e-5),
        seed_claim("… predicted less measured effect in the linear model, largest (nats)", results,
                   lambda one: max(one["gifts"]["gaps"]["direct"], one["gifts"]["gaps"]["total"]),
                   below=1e-4),
    ]


def quality_claims(results, judged):
    """How much of the MLPs the transcoders keep."""
    def explained(one):
        return min(fit["explained"] for fit in one["quality"]["fit"].values())

    def untrained(one):
        return one["untrained"]["quality"]["recovered"]["mean"]

    def untrained_errors(one):
        return one["untrained"]["gifts"]["error_share"]

    def share(kind):
        return mean_text(results, lambda one: one["gifts"]["shares"][kind])

    return [
        add_control(
            seed_claim("variance of mlp_out explained, the worse layer", results,
                       explained, above=0.9, judged=judged),
            f"untrained {mean_text(results, lambda one: explained(one['untrained']))}, linear map "
            f"{mean_text(results, lambda one: min(one['linear'].values()))}"),
        add_control(
            seed_claim("loss recovered with both MLPs replaced, over their mean", results,
                       lambda one: one["quality"]["recovered"]["mean"], above=0.98, judged=judged),
            f"untrained {mean_text(results, untrained)}"),
        seed_claim("… over zero ablation", results,
                   lambda one: one["quality"]["recovered"]["zero"]),
        add_control(
            seed_claim("active features a token, the more active layer", results,
                       lambda one: max(fit["L0"] for fit in one["quality"]["fit"].values())),
            f"of {RECIPE.n_latents}"),
        add_control(
            seed_claim("error nodes' share of what MLPs add to the answer", results,
                       lambda one: one["gifts"]["error_share"], below=0.2, judged=judged),
            f"untrained {mean_text(results, untrained_errors)}"),
        add_control(
            seed_claim("… with signs, of the answer", results,
                       lambda one: one["gifts"]["shares"]["errors"]),
            f"features {share('features')}, tokens {share('tokens')}, biases {share('biases')}"),
    ]


def effect_claims(results, judged):
    """Predicted against measured effects of removing a feature; of layer 0, whose features act
    through an attention and an MLP. Those of the last MLP are exact where scales are kept."""
    def of_gifts(number, way, layer=0):
        return lambda one: one["gifts"][number][way][layer]

    def untrained(number):
        return mean_text(results, lambda one: one["untrained"]["gifts"][number][free][0])

    free = "patterns and scales"

    last = max(results[0]["gifts"]["null"])
    null = max(one["gifts"]["null"][0] for one in results)
    is_found = all(one["gifts"]["r"][free][0] > one["gifts"]["null"][0] for one in results)

    def of_last(number):
        return f"MLP {last}: {mean_text(results, of_gifts(number, 'nothing', last))}"

    return [
        add_control(
            seed_claim("predicted and measured effect of a feature of MLP 0, patterns and scales "
                       "kept: r", results, of_gifts("r", free), above=0.9, holds=is_found,
                       judged=judged),
            f"shuffled {null:.2f}, untrained {untrained('r')}"),
        add_control(
            seed_claim("… measured over predicted effect (slope)", results,
                       of_gifts("slope", free)),
            f"untrained {untrained('slope')}"),
        seed_claim("… r of direct effects alone", results,
                   lambda one: one["gifts"]["r_direct"][0]),
        add_control(
            seed_claim("… r with nothing kept (above 0.9 was hoped for)", results,
                       of_gifts("r", "nothing")), of_last("r")),
        add_control(
            seed_claim("… slope with nothing kept: scales and patterns move", results,
                       of_gifts("slope", "nothing")),
            f"{of_last('slope')}; scales kept {mean_text(results, of_gifts('slope', 'scales'))}, "
            f"patterns kept {mean_text(results, of_gifts('slope', 'patterns'))}"),
        seed_claim("… r with scales kept", results, of_gifts("r", "scales")),
        seed_claim("… r with patterns kept", results, of_gifts("r", "patterns")),
    ]


def transcoder_figure(one):
    """Predicted against measured effects of each feature, of what `measure_transcoders` gave."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    gifts = one["gifts"]
    both = figure.subplots(1, 2, sharey=True)
    for axes, way in zip(both, ("patterns and scales", "nothing"), strict=True):
        bare_axes(axes, f"{way} kept:\nr = {gifts['r'][way][0]:.2f} for features of MLP 0",
                  "predicted effect (nats)", "measured effect (nats)")
        for (layer, effects), colour in zip(gifts["effects"].items(), COLOURS, strict=False):
            axes.scatter(effects["total"], effects[way], s=8, color=colour, edgecolors="none",
                         label=f"MLP {layer}")
        axes.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
        axes.legend(frameon=False)
    return figure
