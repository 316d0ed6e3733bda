"""Chapter 9 as a learner would write it: replacing parts of a run, one hook at a time."""

import torch


def derangement(n, generator):
    """A random order of n things in which none stays in its place (a derangement).

    generator: a torch.Generator, the only source of randomness. n is 2 or more. Returns [n],
    integers: every such order is equally likely.
    """
    while True:
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


def replacement_value(z, mode, source=None):
    """The values that replace a head's z in an ablation.

    z: [batch, pos, head, d_head], the activations of a reference run. mode: "zero"; "mean", over
    texts and positions; "mean_pos", over texts at each position; "resample", of text source[i] for
    text i, with source [batch]. Returns a tensor that broadcasts to z.
    """
    if mode == "zero":
        return torch.zeros_like(z)
    if mode == "mean":
        return z.mean((0, 1), keepdim=True)
    if mode == "mean_pos":
        return z.mean(0, keepdim=True)
    return z[source]


@torch.no_grad()
def ablated_logits(model, tokens, layer, head, value):
    """The logits of a run in which one head's z is replaced.

    tokens: [batch, pos]. value: a tensor that broadcasts to z, [batch, pos, head, d_head], such as
    that of replacement_value; only this head's part is used. model.run_with_hooks(tokens, [(name,
    fn)]) runs with a hook; fn(tensor, hook) returns the new activation. Returns [batch, pos,
    d_vocab].
    """

    def replace(z, hook):
        z = z.clone()
        z[:, :, head] = value.expand_as(z)[:, :, head]
        return z

    return model.run_with_hooks(tokens, [(f"blocks.{layer}.attn.hook_z", replace)])


@torch.no_grad()
def patch_position(model, tokens, source_cache, name, pos):
    """The logits of a run in which one activation, at one position, is taken from another run.

    tokens: [batch, pos], of the run that is patched. source_cache[name]: the activation of the
    other run, [batch, pos, …], as in this one. Returns [batch, pos, d_vocab].
    """

    def patch(tensor, hook):
        tensor = tensor.clone()
        tensor[:, pos] = source_cache[name][:, pos]
        return tensor

    return model.run_with_hooks(tokens, [(name, patch)])


def denoise_stream(model, clean_tokens, corrupted_tokens, metric):
    """Where the answer is carried: patch the clean stream into a corrupted run, place by place.

    clean_tokens, corrupted_tokens: [batch, pos]. metric(logits) -> [batch]. patch_position may be
    called. Returns [layer, pos], means over the batch: the corrupted run with the stream before
    that block ("blocks.{layer}.hook_resid_pre") taken from the clean run at that position.
    """
    with torch.no_grad():
        _, clean_cache = model.run_with_cache(clean_tokens)
    rows = []
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        row = [metric(patch_position(model, corrupted_tokens, clean_cache, name, pos)).mean()
               for pos in range(corrupted_tokens.shape[1])]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def normalise_effect(patched, corrupted, clean):
    """A patched metric on a scale from the corrupted run, 0, to the clean run, 1.

    patched: [...], the metric of a corrupted run that was patched from the clean one; corrupted,
    clean: the metric of the two runs as they are, scalars. Returns [...]: 0 if nothing was
    restored, 1 if everything was.
    """
    return (patched - corrupted) / (clean - corrupted)


@torch.no_grad()
def direct_effect(model, clean_tokens, corrupted_tokens, layer, head):
    """Path patching, from one head straight to the logits: everything else as in the clean run.

    Returns [batch, pos, d_vocab]: the clean run's logits if, of the last stream, only what this
    head writes were that of the corrupted run. run_with_cache(tokens)[1] has
    "blocks.{layer}.attn.hook_z" and, for the last layer l, "blocks.{l}.hook_resid_post".
    model.blocks[layer].attn.W_O: [head, d_head, d_model]. model.unembed(resid) -> logits.
    """
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    name = f"blocks.{layer}.attn.hook_z"
    _, clean_cache = model.run_with_cache(clean_tokens)
    _, corrupted_cache = model.run_with_cache(corrupted_tokens)
    change = corrupted_cache[name][:, :, head] - clean_cache[name][:, :, head]
    written = change @ model.blocks[layer].attn.W_O[head]  # [batch, pos, d_model]
    return model.unembed(clean_cache[last] + written)


def auroc(scores, truth):
    """The AUROC: the chance that a true item has a higher score than a false one.

    scores: [n]; truth: [n], booleans. Of all pairs of a true item and a false one, the share in
    which the true item is higher; a tie counts half. Returns a float: 1 if all true items are on
    top, 0.5 for chance.
    """
    true = scores[truth][:, None]  # [true, 1]
    others = scores[~truth]
    wins = (true > others).double() + 0.5 * (true == others).double()  # [true, other]
    return wins.mean().item()
