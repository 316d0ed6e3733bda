"""Scan untrained models for a previous-token head, and count how often one is "found".

    python experiments/claim_card.py check dead_heads

The claim, its null and its threshold are on the card: card.md in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import functools

import torch

from config import ModelConfig
from experiments.cards.measure import perform_study
from experiments.common import LEVEL
from experiments.wired.model import previous_token
from metrics import bootstrap_ci, holm, permutation_pvalue, prev_token_score
from model import GPT
from utils import run_program, seeded_generator

MODELS = 200  # untrained ones for each seed of the card
DRAWS = 999  # of keys to look at, for a p-value
TEXTS = 16  # of random tokens, as long as the context
SHAPE = ModelConfig(n_layers=3, n_heads=4, d_model=64, n_ctx=16, d_vocab=65, attn_only=True)


@torch.no_grad()
def head_patterns(model, generator):
    """The patterns of all heads on random texts: [head, text, query_pos, key_pos]."""
    tokens = torch.randint(model.cfg.d_vocab, (TEXTS, model.cfg.n_ctx), generator=generator)
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    return cache.stack("pattern").transpose(1, 2).flatten(0, 1)


def scores_of_drawn_keys(pattern, generator):
    """The null, [draw, head]: the attention that each query pays to one key, drawn for it from
    those that it sees. pattern: [head, text, query_pos, key_pos]."""
    queries = torch.arange(1, pattern.shape[-1])  # the first query sees nothing but itself
    drawn = torch.rand(DRAWS, len(queries), generator=generator)
    keys = (drawn * (queries + 1)).long()  # [draw, query]
    of_texts = pattern.mean(1)  # [head, query_pos, key_pos]
    return of_texts[:, queries, keys].mean(-1).T


def p_values(pattern, generator):
    """(each head's own p-value [head]; the same, each draw counted by its largest head)."""
    scores = prev_token_score(pattern).mean(1)  # [head]
    null = scores_of_drawn_keys(pattern, generator)
    own = torch.stack([permutation_pvalue(score, draws)
                       for score, draws in zip(scores, null.T, strict=True)])
    return own, permutation_pvalue(scores, null)


@functools.cache
def untrained_heads(seed):
    """Of the untrained models of a seed of the card: (scores [model, text, head], own p-values
    [model, head], p-values with the scan paid for [model, head])."""
    found = []
    for number in range(MODELS):
        own_seed = 1000 * seed + number
        generator = seeded_generator(own_seed)
        pattern = head_patterns(GPT(SHAPE, own_seed), generator)
        found.append((prev_token_score(pattern).T, *p_values(pattern, generator)))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def share_of_models(p):
    """The share of models in which the best head has a p-value below LEVEL. p: [model, head]."""
    return (p.min(-1).values < LEVEL).double().mean()


def measure(seed):
    """The share if each draw counts by its largest head."""
    _, _, paid = untrained_heads(seed)
    return share_of_models(paid)


def with_holm(seed):
    """The share by Holm's correction of the heads' own p-values."""
    _, own, _ = untrained_heads(seed)
    return share_of_models(torch.stack(list(map(holm, own))))


def null(seed):
    """The share if the scan is not paid for: the smallest of all heads' own p-values."""
    _, own, _ = untrained_heads(seed)
    return share_of_models(own)


def more(seed):
    """Whether a true head is found, and what another null calls significant."""
    generator = seeded_generator(seed)
    _, wired = p_values(head_patterns(previous_token(seed).model, generator), generator)

    scores, _, _ = untrained_heads(seed)
    even = (1 / torch.arange(2, SHAPE.n_ctx + 1)).mean()
    low, high = bootstrap_ci(scores.transpose(0, 1), n_draws=200)  # [model, head]
    left_out = (even < low) | (even > high)
    return {"p of a previous-token head that is wired by hand": wired.min().item(),
            "share of untrained heads whose interval over texts leaves out even attention":
                left_out.double().mean().item()}


def main(argv=None):
    """Run the program: measure every seed, print the table, write the results."""
    perform_study(__file__, __doc__, measure, null, ways={"by Holm": with_holm}, more=more,
                  argv=argv)


if __name__ == "__main__":
    run_program(main)
