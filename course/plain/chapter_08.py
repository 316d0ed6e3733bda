"""Chapter 8 as a learner would write it: logits as sums of parts."""

import torch


def logit_difference(logits, correct, wrong):
    """The logit difference at the last position: ln of how many times likelier an answer is.

    logits: [batch, pos, d_vocab]; correct, wrong: [batch], ids. Returns [batch], in nats.
    """
    last = logits[:, -1]  # [batch, d_vocab]
    rows = torch.arange(len(last))
    return last[rows, correct] - last[rows, wrong]


def target_rank(logits, target):
    """How many tokens have a higher logit than the target, at the last position.

    logits: [batch, pos, d_vocab]; target: [batch], ids. Returns [batch], whole numbers: 0 if the
    target is the likeliest.
    """
    last = logits[:, -1]  # [batch, d_vocab]
    own = last[torch.arange(len(last)), target]  # [batch]
    return (last > own[:, None]).sum(-1)


def decompose_stream(model, cache):
    """The parts of the last stream, which sum to it: embeddings, attention and MLP of each layer.

    cache: cache["embed"], cache["pos_embed"], cache["attn_out", layer] and cache["mlp_out", layer],
    each [batch, pos, d_model]. model.cfg.n_layers: how many layers. Returns [component, batch, pos,
    d_model], in the order in which they were written.
    """
    writes = [cache["embed"], cache["pos_embed"]]
    for layer in range(model.cfg.n_layers):
        writes.append(cache["attn_out", layer])
        writes.append(cache["mlp_out", layer])
    return torch.stack(writes)


def read_through_norm(stack, scale, w):
    """LayerNorm applied to each part of a stream, with the scale of the whole stream.

    stack: [component, batch, pos, d_model], parts that sum to the stream; scale: [batch, pos, 1],
    by which LayerNorm divides; w: [d_model], its weight. Returns the same shape: the parts, plus b
    once, sum to LayerNorm's output.
    """
    centred = stack - stack.mean(-1, keepdim=True)
    return centred / scale * w


def attribute_logits(model, cache, correct, wrong):
    """What each part of the model adds to the logit difference at the last position.

    model.W_U: [d_model, d_vocab]; model.ln_final.w and .b: [d_model]. cache["scale", None]: the
    scale of the last LayerNorm, [batch, pos, 1]. correct, wrong: [batch], ids. decompose_stream and
    read_through_norm may be called. Returns [component + 1, batch]: the parts in the order of
    decompose_stream, then that of LayerNorm's b (the unembedding has no bias here); they sum to the
    logit difference.
    """
    directions = (model.W_U[:, correct] - model.W_U[:, wrong]).T  # [batch, d_model]
    stack = decompose_stream(model, cache)[:, :, -1:]  # [component, batch, 1, d_model]
    read = read_through_norm(stack, cache["scale", None][:, -1:], model.ln_final.w)
    parts = (read[:, :, 0] * directions).sum(-1)  # [component, batch]
    from_bias = directions @ model.ln_final.b  # [batch]
    return torch.cat([parts, from_bias[None]])


def read_early(model, cache):
    """The logit lens: the model's prediction if it stopped before each block.

    cache["resid_pre", layer] and cache["resid_post", layer]: the streams, [batch, pos, d_model].
    model.unembed(resid) -> logits: the last LayerNorm and W_U. Returns [row, batch, pos, d_vocab]:
    a row before each block, and the last one after all of them: the model's own logits.
    """
    rows = [cache["resid_pre", layer] for layer in range(model.cfg.n_layers)]
    rows.append(cache["resid_post", model.cfg.n_layers - 1])
    return torch.stack([model.unembed(resid) for resid in rows])


def norm_shares(stack):
    """How much of the stream's length each part accounts for.

    stack: [component, batch, pos, d_model], parts c that sum to the stream r. Returns [component,
    batch, pos], <c, r> / |r|^2: they sum to 1, and a part that writes against the stream has a
    negative one.
    """
    resid = stack.sum(0)  # [batch, pos, d_model]
    return (stack * resid).sum(-1) / resid.pow(2).sum(-1)


def effective_rank(matrix):
    """How many directions a matrix uses: exp of the entropy of its normalised singular values.

    matrix: [rows, cols]. Its singular values are divided by their sum. Returns a scalar: r for r
    equal singular values, 1 for a matrix of rank one.
    """
    values = torch.linalg.svdvals(matrix)
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


def composition_score(written, read):
    """The composition score: how much of what one head writes another head reads.

    written: [d_model, d_model], the first head's OV matrix, a row vector on its left; read:
    [d_model, d_model], what the second one does with a row vector. Returns a scalar, the Frobenius
    norm of the product over the product of the norms: 0 if the second head reads nothing of it.
    """
    return (written @ read).norm() / (written.norm() * read.norm())
