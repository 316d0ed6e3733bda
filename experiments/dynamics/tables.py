"""Tables of n-grams: how often each token follows the last n - 1 tokens of a text.

A table is the best predictor that sees only so many tokens, and so a yardstick for a model: at each
step of its training, which table does it resemble most? Tables are smoothed, so that nothing has
probability 0: each has one more observation in every context, which is the table one token shorter.

    p_n(w | context) = (count(context, w) + p_{n-1}(w | shorter context)) / (count(context) + 1)

and p_0 is the uniform guess. A context that never occurred leaves the shorter table's prediction.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: losses.py, data.py
Next: experiments/dynamics/model.py
Source: Shannon 1951 (n-grams); MacKay & Peto 1995 (the shorter table as a prior)
"""

import torch

from losses import per_token_loss
from utils import UserError, seeded_generator

MOST_CELLS = 1 << 24  # of one table
TABLES = ("uniform", "unigrams", "bigrams", "trigrams")


def count_ngrams(tokens, d_vocab, n):
    """How often each n-gram occurs in tokens [length]: [d_vocab] * n, the last axis for the token
    that comes last. Raises UserError if the table would be too large."""
    if d_vocab**n > MOST_CELLS:
        raise UserError(f"a table of {n}-grams of {d_vocab:,} tokens has {d_vocab**n:,} cells, "
                        f"more than {MOST_CELLS:,}; use a smaller vocabulary")
    n_grams = tokens.unfold(0, n, 1)  # [length - n + 1, n]
    places = (n_grams * d_vocab ** torch.arange(n - 1, -1, -1)).sum(-1)
    return places.bincount(minlength=d_vocab**n).view([d_vocab] * n)


def ngram_tables(tokens, d_vocab, most=3):
    """The log-probabilities of 0-grams (uniform), unigrams, bigrams, … up to `most`, a list.

    tokens: [length], the text that is counted. Table n is [d_vocab] * max(n, 1): its last axis is
    the next token, those before it are the last n - 1 tokens, the latest one last.
    """
    table = torch.full((d_vocab,), 1 / d_vocab, dtype=torch.float64)
    tables = [table]
    for n in range(1, most + 1):
        counts = count_ngrams(tokens, d_vocab, n).double()
        table = (counts + table) / (counts.sum(-1, keepdim=True) + 1)
        tables.append(table)
    return [table.log().float() for table in tables]


def predict(table, tokens):
    """What a table of n-grams predicts after each token of some texts, except the first.

    table: log-probabilities, as in `ngram_tables`, up to trigrams. tokens: [batch, pos]. Returns
    log-probabilities of the next token, [batch, pos - 1, d_vocab]. The first position is left out,
    because trigrams see two tokens.
    """
    seen = (tokens[:, :-1], tokens[:, 1:])  # the token before, and the current one
    n_seen = max(table.ndim - 1, 0)
    rows = table[seen[len(seen) - n_seen :]]
    return rows.expand(*tokens[:, 1:].shape, -1)


def trigram_losses(tables, tokens):
    """The loss of each token of a text except the first, [length - 1], in nats, if trigrams predict
    it; bigrams predict the second token. tables: those of `ngram_tables`; tokens: [length]."""
    second = tables[2][tokens[:1]]
    others = predict(tables[3], tokens[None, :-1])[0]
    return per_token_loss(torch.cat([second, others]), tokens[1:])


def shuffled(tokens, seed=0):
    """The same tokens [length] in a random order: what single tokens tell stays, pairs do not."""
    return tokens[torch.randperm(len(tokens), generator=seeded_generator(seed))]


def renamed(tokens, d_vocab, seed=0):
    """The same text with each token of the vocabulary replaced by another one throughout."""
    return torch.randperm(d_vocab, generator=seeded_generator(seed))[tokens]
