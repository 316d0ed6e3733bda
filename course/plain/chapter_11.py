"""Chapter 11 as a learner would write it: repeats, and the head that continues them."""

import torch


def repeated_batch(d_vocab, batch_size, n_ctx, generator):
    """Random tokens that repeat with a period: (inputs, targets), each [batch, pos].

    Each row draws its own period, evenly from 4, …, (n_ctx + 1) // 2, and as many random tokens,
    which are then repeated. Targets are a token later. generator: a torch.Generator, the only
    source of randomness. n_ctx is 8 or more.
    """
    longest = (n_ctx + 1) // 2
    rows = []
    for _ in range(batch_size):
        period = int(torch.randint(4, longest + 1, (1,), generator=generator))
        piece = torch.randint(d_vocab, (period,), generator=generator)
        times = (n_ctx + 1) // period + 1
        rows.append(piece.repeat(times)[: n_ctx + 1])
    windows = torch.stack(rows)  # [batch, pos + 1]
    return windows[:, :-1], windows[:, 1:]


def earlier_occurrences(tokens):
    """The earlier occurrences of each token, [batch, query_pos, key_pos]: True if the key is the
    query's token, at an earlier position.

    tokens: [batch, pos], ids.
    """
    same = tokens[:, :, None] == tokens[:, None, :]  # [batch, query_pos, key_pos]
    return same.tril(-1)


def duplicate_token_score(pattern, tokens):
    """The attention that a repeated token pays to its earlier occurrences.

    pattern: [batch, head, query_pos, key_pos]; tokens: [batch, pos]. The attention to all earlier
    occurrences is summed, and averaged over the queries that have any. earlier_occurrences may be
    called. Returns [batch, head].
    """
    earlier = earlier_occurrences(tokens)
    n_queries = earlier.any(-1).sum(-1)  # [batch]
    return (pattern * earlier[:, None]).sum((-2, -1)) / n_queries[:, None]


def induction_score(pattern, tokens):
    """The attention that a repeated token pays to the tokens that followed it before.

    pattern: [batch, head, query_pos, key_pos]; tokens: [batch, pos]. The attention to every key
    that comes right after an earlier occurrence is summed, and averaged over the queries that have
    any. earlier_occurrences may be called. Returns [batch, head], from 0 to 1.
    """
    earlier = earlier_occurrences(tokens)
    after = torch.zeros_like(earlier)
    after[:, :, 1:] = earlier[:, :, :-1]
    n_queries = after.any(-1).sum(-1)  # [batch]
    return (pattern * after[:, None]).sum((-2, -1)) / n_queries[:, None]


def wire_induction(tokens):
    """The pattern of a perfect induction head, made by hand.

    tokens: [batch, pos]. A query whose token occurred before looks, with all its attention, at the
    token after its latest earlier occurrence; any other query looks at position 0. Returns [batch,
    query_pos, key_pos].
    """
    n_batch, n_pos = tokens.shape
    pattern = torch.zeros(n_batch, n_pos, n_pos)
    for row in range(n_batch):
        for query in range(n_pos):
            key = 0
            for earlier in range(query):
                if tokens[row, earlier] == tokens[row, query]:
                    key = earlier + 1  # a later one takes its place
            pattern[row, query, key] = 1.0
    return pattern


def copy_prediction(pattern, tokens, d_vocab):
    """The prediction of a head that copies: the attention that each token of the vocabulary gets.

    pattern: [batch, query_pos, key_pos]; tokens: [batch, pos]. Returns [batch, query_pos, d_vocab]:
    the attention to all keys with this token, summed; each row sums to 1.
    """
    hot = torch.nn.functional.one_hot(tokens, d_vocab).float()  # [batch, key_pos, d_vocab]
    return pattern @ hot


def loss_by_repeat(losses, period):
    """The mean loss of a text's first period, and of its repetitions.

    losses: [batch, pos], where position i is the loss at predicting token i + 1 of a text that
    repeats with this period. Tokens 1, …, period - 1 are new; from token `period` on, each is a
    repetition. Returns (first, repeated), scalars.
    """
    first = losses[:, : period - 1].mean()
    repeated = losses[:, period - 1 :].mean()
    return first, repeated


def k_composition(W_OV, W_QK):
    """How much of what an earlier head writes is read by a later head's keys.

    W_OV: [d_model, d_model], what the earlier head writes: resid @ W_OV. W_QK: [d_model, d_model],
    the later head's: score = query_resid @ W_QK @ key_resid. Returns a scalar: the Frobenius norm
    of the product, which maps the query and the earlier head's input at the key to the score, over
    the norms of both.
    """
    through = W_QK @ W_OV.T  # score = query_resid @ W_QK @ (resid @ W_OV) = query @ through @ resid
    return through.norm() / (W_QK.norm() * W_OV.norm())


def first_crossing(steps, values, level):
    """The first step from which a curve never falls below a level again.

    steps, values: lists, such as steps of training and a head's score there. Returns the step, or
    None if the curve ends below.
    """
    crossing = None
    for step, value in zip(steps, values, strict=True):
        if value < level:
            crossing = None
        elif crossing is None:
            crossing = step
    return crossing
