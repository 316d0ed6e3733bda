"""Other right solutions of the exercises of chapter 9."""

import torch


def derangement_as_swaps(n, generator):
    # draws until no place keeps its own
    while True:
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = int(torch.randint(i + 1, (1,), generator=generator))
            order[i], order[j] = order[j], order[i]
        if all(place != thing for place, thing in enumerate(order)):
            return torch.tensor(order)


def replacement_value_as_expanded(z, mode, source=None):
    if mode == "zero":
        return 0.0 * z
    if mode == "mean":
        return z.flatten(0, 1).mean(0).expand_as(z)
    if mode == "mean_pos":
        return z.mean(0).expand_as(z)
    return torch.stack([z[i] for i in source.tolist()])


def ablated_logits_as_where(model, tokens, layer, head, value):
    n_heads = model.cfg.n_heads
    gone = (torch.arange(n_heads) == head)[:, None]
    with torch.no_grad(), model.hooks([(f"blocks.{layer}.attn.hook_z",
                                        lambda z, hook: torch.where(gone, value, z))]):
        return model(tokens)


def ablated_logits_as_output(model, tokens, layer, head, value):
    # the same edit, one step later: in what the heads write together
    attn = model.blocks[layer].attn
    with torch.no_grad():
        z = model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_z"]
        change = (value.expand_as(z) - z)[:, :, head] @ attn.W_O[head]
        return model.run_with_hooks(tokens, [(f"blocks.{layer}.hook_attn_out",
                                              lambda out, hook: out + change)])


def patch_position_as_where(model, tokens, source_cache, name, pos):
    source = source_cache[name]
    here = torch.zeros(source.shape[1], dtype=torch.bool)
    here[pos] = True
    here = here.view(1, -1, *[1] * (source.ndim - 2))
    with torch.no_grad():
        return model.run_with_hooks(tokens, [(name, lambda t, hook: torch.where(here, source, t))])


def denoise_stream_as_restart(model, clean_tokens, corrupted_tokens, metric):
    n_layers, n_pos = model.cfg.n_layers, corrupted_tokens.shape[1]
    values = torch.zeros(n_layers, n_pos)
    with torch.no_grad():
        clean, corrupted = model.embed(clean_tokens), model.embed(corrupted_tokens)
        for layer in range(n_layers):
            for pos in range(n_pos):
                resid = corrupted.clone()
                resid[:, pos] = clean[:, pos]
                logits = model.unembed(model.run_blocks(resid, start=layer))
                values[layer, pos] = metric(logits).mean()
            clean = model.run_blocks(clean, start=layer, stop=layer + 1)
            corrupted = model.run_blocks(corrupted, start=layer, stop=layer + 1)
    return values


def normalise_effect_as_interpolation(patched, corrupted, clean):
    return 1 - (clean - patched) / (clean - corrupted)


def direct_effect_as_result(model, clean_tokens, corrupted_tokens, layer, head):
    with torch.no_grad():
        name = f"blocks.{layer}.attn.hook_result"
        one, other = (model.run_with_cache(tokens, [name])[1][name][:, :, head]
                      for tokens in (clean_tokens, corrupted_tokens))
        last = model.run_blocks(model.embed(clean_tokens))
        return model.unembed(last - one + other)


def auroc_as_ranks(scores, truth):
    order = scores.unique()
    n_true, n_others = int(truth.sum()), int((~truth).sum())
    below, total = 0, 0.0
    for value in order:
        here = scores == value
        others = int((here & ~truth).sum())
        total += int((here & truth).sum()) * (below + others / 2)
        below += others
    return total / (n_true * n_others)


def auroc_as_loop(scores, truth):
    total, pairs = 0.0, 0
    for one, is_true in zip(scores.tolist(), truth.tolist(), strict=True):
        for other, also_true in zip(scores.tolist(), truth.tolist(), strict=True):
            if is_true and not also_true:
                total += 1.0 if one > other else 0.5 if one == other else 0.0
                pairs += 1
    return total / pairs
