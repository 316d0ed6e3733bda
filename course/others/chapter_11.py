"""Other right solutions of the exercises of chapter 11."""

import torch


def repeated_batch_as_gather(d_vocab, batch_size, n_ctx, generator):
    drawn = torch.randint(d_vocab, (batch_size, n_ctx + 1), generator=generator)
    periods = torch.randint(4, (n_ctx + 1) // 2 + 1, (batch_size, 1), generator=generator)
    windows = drawn.gather(1, torch.arange(n_ctx + 1) % periods)
    return windows[:, :-1], windows[:, 1:]


def earlier_occurrences_as_loops(tokens):
    n_batch, n_pos = tokens.shape
    found = torch.zeros(n_batch, n_pos, n_pos, dtype=torch.bool)
    for row in range(n_batch):
        for query in range(n_pos):
            for key in range(query):
                found[row, query, key] = tokens[row, key] == tokens[row, query]
    return found


def earlier_occurrences_as_positions(tokens):
    pos = torch.arange(tokens.shape[1])
    return (tokens.unsqueeze(2) == tokens.unsqueeze(1)) & (pos[None, :] < pos[:, None])


def duplicate_token_score_as_loops(pattern, tokens):
    scores = torch.zeros(pattern.shape[:2])
    for row, ids in enumerate(tokens.tolist()):
        paid = []
        for query, token in enumerate(ids):
            keys = [key for key in range(query) if ids[key] == token]
            if keys:
                paid.append(pattern[row, :, query, keys].sum(-1))
        scores[row] = torch.stack(paid).mean(0)
    return scores


def induction_score_as_loops(pattern, tokens):
    scores = torch.zeros(pattern.shape[:2])
    for row, ids in enumerate(tokens.tolist()):
        paid = []
        for query, token in enumerate(ids):
            keys = [key + 1 for key in range(query) if ids[key] == token]
            if keys:
                paid.append(pattern[row, :, query, keys].sum(-1))
        scores[row] = sum(paid) / len(paid)
    return scores


def induction_score_as_previous_token(pattern, tokens):
    # a key counts where the token before it is the query's
    before = tokens.roll(1, 1)
    pos = torch.arange(tokens.shape[1])
    counts = (before[:, None, :] == tokens[:, :, None]) & (pos[None] <= pos[:, None]) & (pos > 0)
    per_query = (pattern * counts[:, None]).sum(-1)
    has_any = counts.any(-1)[:, None]
    return (per_query * has_any).sum(-1) / has_any.sum(-1)


def wire_induction_as_dictionary(tokens):
    pattern = torch.zeros(*tokens.shape, tokens.shape[1])
    for row, ids in enumerate(tokens.tolist()):
        latest = {}
        for query, token in enumerate(ids):
            pattern[row, query, latest.get(token, -1) + 1] = 1
            latest[token] = query
    return pattern


def copy_prediction_as_scatter(pattern, tokens, d_vocab):
    chances = pattern.new_zeros(*pattern.shape[:2], d_vocab)
    return chances.scatter_add(-1, tokens[:, None, :].expand_as(pattern), pattern)


def loss_by_repeat_as_mask(losses, period):
    predicted = torch.arange(1, losses.shape[1] + 1)
    return losses[:, predicted < period].mean(), losses[:, predicted >= period].mean()


def k_composition_as_transposed(W_OV, W_QK):
    return (W_OV @ W_QK.T).norm() / W_OV.norm() / W_QK.norm()


def first_crossing_as_backwards(steps, values, level):
    found = None
    for step, value in reversed(list(zip(steps, values, strict=True))):
        if value < level:
            break
        found = step
    return found
