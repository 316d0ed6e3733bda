"""Measure what a model can do at each kept step of its training.

At each step: how far its predictions are from tables of n-grams, its loss by token and by position,
where each head looks and what its removal costs and, for text with a known floor, how far each kind
of word lies above it. All texts are held out from training.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: experiments/dynamics/tables.py, experiments/dynamics/model.py
Next: experiments/training_dynamics.py
Source: Olsson et al. 2022 (heads and losses over training); Chang & Bergen 2022 (n-grams first)
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from activation_cache import get_act_name, head_label
from corpus import Floor
from experiments.dynamics.model import states_of
from experiments.dynamics.tables import (
    TABLES,
    ngram_tables,
    predict,
    renamed,
    shuffled,
    trigram_losses,
)
from head_ablation import head_importance
from losses import kl_divergence, per_token_loss
from metrics import duplicate_token_score, induction_score, prev_token_score
from train import token_losses
from utils import Progress

WINDOWS = 48  # of held-out text
ABLATED = 16  # of them, on which heads are removed
FLOOR_TOKENS = 6000  # of held-out text whose floor is known
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the losses of single tokens
BINS = 24  # of the histogram of these losses
SHOWN = 2  # windows that the page shows


@dataclass(frozen=True)
class HeldOut:
    """What a model's states are measured on.

    d_vocab: the size of the vocabulary. windows: held-out tokens [batch, pos]. tables: {name:
    log-probabilities [batch, pos - 1, d_vocab] of the next token after each position but the
    first}. tokens: [n], the beginning of the held-out text; floor: its Floor; trigrams_above:
    {category: nats}, how far trigrams are above it. The last two are None where the floor is not
    known.
    """

    d_vocab: int
    windows: torch.Tensor
    tables: dict
    tokens: torch.Tensor
    floor: Floor | None
    trigrams_above: dict | None


def hold_out(dataset, n_ctx):
    """The HeldOut of a Dataset, for models that read n_ctx tokens."""
    d_vocab = dataset.tokenizer.d_vocab
    windows = dataset.val[: WINDOWS * n_ctx].view(-1, n_ctx)
    tables = ngram_tables(dataset.train, d_vocab)
    named = dict(zip(TABLES, tables, strict=True))
    named["shuffled bigrams"] = ngram_tables(shuffled(dataset.train), d_vocab, 2)[2]
    named["renamed bigrams"] = ngram_tables(renamed(dataset.train, d_vocab), d_vocab, 2)[2]
    predicted = {name: predict(table, windows) for name, table in named.items()}

    tokens = dataset.val[:FLOOR_TOKENS]
    if dataset.floor is None or dataset.tokenizer.kind != "word":
        return HeldOut(d_vocab, windows, predicted, tokens, None, None)
    floor = beginning_of(dataset.floor, len(tokens))
    above = floor.above(trigram_losses(tables, tokens).double())
    return HeldOut(d_vocab, windows, predicted, tokens, floor, above)


def beginning_of(floor, n):
    """The Floor of the first n tokens of a text."""
    return replace(floor, log_probs=floor.log_probs[:n], categories=floor.categories[:n],
                   starts=[start for start in floor.starts if start < n])


def measure_training(recipe, history, held, show):
    """What every kept state of a training does: {"steps", "states": [what `measure_state` returns],
    "heads": labels, "trigrams_above", "shown": [what `show_state` returns]}.

    recipe: a DynamicsRecipe. held: a HeldOut. show: whether to record what the page shows.
    """
    states = []
    shown = []
    progress = Progress(len(history["steps"]), " states")
    cfg = replace(recipe.model, d_vocab=held.d_vocab)
    for _, model in states_of(cfg, history):
        states.append(measure_state(model, held))
        if show:
            shown.append(show_state(model, held.windows))
        progress.show(len(states), f"{recipe.name} measured")
    progress.close()

    labels = [head_label(layer, head) for layer in range(cfg.n_layers) for head in
              range(cfg.n_heads)]
    return {"steps": history["steps"], "states": states, "heads": labels,
            "trigrams_above": held.trigrams_above, "shown": shown}


@torch.no_grad()
def measure_state(model, held):
    """What one state of a model does, a dict of plain values.

    distance: {table: mean KL(table ‖ model) in nats per token}, the extra loss of the model on a
    text whose tokens are drawn from the table. loss, quantiles: of the losses of single tokens.
    by_position: [pos - 1], the mean loss of the second token, the third, … heads: {measure:
    [head]}, the scores and the effect of each, in nats per token. above: {category: nats above the
    floor}, where that is known.
    """
    windows = held.windows
    has_heads = model.cfg.n_layers > 0
    names = [get_act_name("pattern", layer) for layer in range(model.cfg.n_layers)]
    with model.caching(names) if has_heads else nullcontext() as cache:
        logits = model(windows)

    losses = per_token_loss(logits[:, :-1], windows[:, 1:])  # [batch, pos - 1]
    found = {"distance": {name: kl_divergence(table, logits[:, 1:]).mean().item()
                          for name, table in held.tables.items()},
             "loss": losses.mean().item(),
             "quantiles": losses.flatten().quantile(torch.tensor(QUANTILES)).tolist(),
             "by_position": losses.mean(0).tolist()}
    if has_heads:
        effects = effects_of_heads(model, windows[:ABLATED]).mean
        found["heads"] = score_heads(windows, cache) | {"effect": effects.flatten().tolist()}
    if held.floor is not None:
        above = token_losses(model, held.tokens, starts=held.floor.starts)
        found["above"] = held.floor.above(torch.tensor(list(above)).double())
    return found


@torch.no_grad()
def show_state(model, windows):
    """What the page shows of one state, a dict of plain values.

    losses, guesses: [window][pos - 1], of the first SHOWN windows: the loss of each token but the
    first, and the id of the likeliest one. histogram: [BINS], the share of tokens by loss, from 0
    to `histogram_end` nats.
    """
    logits = model(windows)[:, :-1]
    losses = per_token_loss(logits, windows[:, 1:])
    end = histogram_end(model.cfg.d_vocab)
    counts = losses.flatten().clamp(max=end).histc(BINS, 0, end)
    return {"losses": losses[:SHOWN].tolist(), "guesses": logits[:SHOWN].argmax(-1).tolist(),
            "histogram": (counts / losses.numel()).tolist()}


def histogram_end(d_vocab):
    """The largest loss of the histogram, in nats: two more than that of a uniform guess. Higher
    losses count there."""
    return math.log(d_vocab) + 2


def score_heads(windows, cache):
    """The mean scores of every head on windows [batch, pos]: {kind: [head]}, in the order of the
    layers. cache: holds the patterns of a run on them."""
    pattern = cache.stack("pattern")  # [layer, batch, head, query_pos, key_pos]
    scores = {"previous token": prev_token_score(pattern),
              "duplicate token": duplicate_token_score(pattern, windows),
              "induction": induction_score(pattern, windows)}
    return {kind: score.nanmean(1).flatten().tolist() for kind, score in scores.items()}


def effects_of_heads(model, windows):
    """The rise of each text's loss, in nats per token, if a head writes its mean over the texts:
    Effects [layer, head, batch]."""
    _, reference = model.run_with_cache(windows, lambda name: name.endswith("hook_z"))
    return head_importance(model, windows, mode="mean", reference=reference)
