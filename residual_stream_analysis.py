"""Decompose the residual stream into what each component, head and neuron wrote to it.

The last stream is the embedding plus everything written to it, so any linear function of it splits
exactly into a sum over the writers. The final LayerNorm is no obstacle: for a fixed scale, which
the cache holds, it is linear too.

    stack, labels = decompose_resid(model, cache)             # [component, batch, pos, d_model]
    stack, labels = decomposition(model, cache, unit="neuron", project_output_onto=direction)

Chapter: COURSE_ROADMAP.md, 8 (read)
Prerequisites: model.py, activation_cache.py
Next: logit_lens.py
Source: Elhage et al. 2021 (the stream as a sum); names of TransformerLens (Nanda & Bloom 2022)
"""

import torch
import torch.nn.functional as F

from activation_cache import check_cache, head_label
from utils import (
    UserError,
    as_index,
    at_least_float32,
    broadcast_shape,
    check_choice,
    check_tensor,
)

UNITS = ("component", "head", "neuron")


def decompose_resid(model, cache, layer=-1, mlp_input=False, *, apply_ln=False):
    """Decomposes the stream that block `layer` reads into components: (stack, labels).

    cache: an ActivationCache of `model`, with LayerNorm folded or not. layer: 0 means the embedding
    only; -1 or n_layers, everything that the unembedding reads. mlp_input: include the block's own
    attention. apply_ln: as the LayerNorm there reads it (`apply_ln_to_stack`).
    Returns [component, batch, pos, d_model], which sums to the stream, and a label for each:
    "embed", "pos_embed", "0_attn_out", "0_mlp_out", …
    Raises UserError for an unknown layer, for a cache of another model, and if the writes do not
    sum to the cached stream.
    """
    stack, labels = decomposition(model, cache, layer, mlp_input=mlp_input)
    if apply_ln:
        return apply_ln_to_stack(model, cache, stack, labels, layer=layer, mlp_input=mlp_input)
    return stack, labels


def full_decomposition(model, cache, layer=-1, mlp_input=False, *, expand_neurons=True,
                       project_output_onto=None):
    """`decompose_resid` down to heads and, with expand_neurons, neurons.

    Biases that belong to no head or neuron are one row, "biases". project_output_onto: as in
    `decomposition`. Use it for a large model: without it, the neurons of GPT-2 small at 64 tokens
    take 7 GB.
    """
    unit = "neuron" if expand_neurons else "head"
    return decomposition(model, cache, layer, unit=unit, mlp_input=mlp_input,
                         project_output_onto=project_output_onto)


def decomposition(model, cache, layer=-1, *, unit="component", mlp_input=False,
                  project_output_onto=None):
    """Decomposes the stream before block `layer` down to `unit`: (stack, labels).

    unit: "component", "head" (the rest as components), or "neuron" (and heads).
    project_output_onto: a direction [batch, pos, d_model], or a tensor that broadcasts to it. The
    result is then each write's dot product with it, and the writes themselves are never built.
    Returns [component, batch, pos, d_model], or with a direction [component, batch, pos].
    Raises UserError as `decompose_resid`, and for an unknown unit.
    """
    check_choice("unit", unit, UNITS)
    layer = resolve_layer(model, cache, layer, mlp_input)
    direction = project_output_onto
    if direction is not None:
        direction = check_direction(direction, model.cfg.d_model)
        check_fits(direction, cache["embed"])

    # the start of the stream
    rows = [as_rows(cache["embed"], direction)]
    labels = ["embed"]
    if model.position_embedding is not None:
        rows.append(as_rows(cache["pos_embed"], direction))
        labels.append("pos_embed")

    # the writes of each block; with mlp_input, of the last block only its attention
    biases = torch.zeros_like(cache["embed"])
    for index, block in enumerate(model.blocks[: layer + mlp_input]):
        if unit == "component":
            rows.append(as_rows(cache["attn_out", index], direction))
            labels.append(f"{index}_attn_out")
        else:
            rows.append(head_writes(cache["z", index], block.attn.W_O.detach(), direction))
            labels += [head_label(index, head) for head in range(model.cfg.n_heads)]
            biases = biases + block.attn.b_O.detach()

        if model.cfg.attn_only or index == layer:
            continue
        if unit == "neuron":
            rows.append(neuron_writes(cache["post", index], block.mlp.W_out.detach(), direction))
            labels += [f"L{index}N{neuron}" for neuron in range(model.cfg.d_mlp)]
            biases = biases + block.mlp.b_out.detach()
        else:
            rows.append(as_rows(cache["mlp_out", index], direction))
            labels.append(f"{index}_mlp_out")
    if unit != "component":
        rows.append(as_rows(biases, direction))
        labels.append("biases")

    stack = torch.cat(rows)
    if unit != "neuron" or direction is not None:  # full neuron writes are too many to sum again
        check_sum(stack, stream_if_kept(model, cache, layer, mlp_input), direction)
    return stack, labels


def check_direction(direction, d_model):
    """The direction [..., d_model] in float32 at least. Raises UserError for another width."""
    if not isinstance(direction, torch.Tensor) or direction.shape[-1:] != (d_model,):
        found = getattr(direction, "shape", None)
        raise UserError(f"the direction is {found and list(found)}; pass a tensor [..., "
                        f"{d_model}] that broadcasts to [batch, pos, d_model]")
    return at_least_float32(direction)


def check_fits(direction, stream):
    """Raises UserError unless the direction broadcasts to the stream."""
    if broadcast_shape(direction, stream) != stream.shape:
        raise UserError(f"the direction is {list(direction.shape)}, the stream "
                        f"{list(stream.shape)}; pass one for each position, or [d_model]")


def stream_if_kept(model, cache, layer, mlp_input):
    """The stream there, [batch, pos, d_model], or None if the cache lacks it."""
    if mlp_input:
        return cache.get(("resid_mid", layer))
    if layer == model.cfg.n_layers:
        return cache.get(("resid_post", layer - 1))
    return cache.get(("resid_pre", layer))


def check_sum(stack, stream, direction):
    """Raises UserError if the rows do not sum to the stream [batch, pos, d_model], or their
    products with `direction` to its product, up to rounding."""
    if stream is None:
        return
    exact = torch.promote_types(stack.dtype, torch.float32)
    error = stack.sum(0, dtype=exact) - as_rows(stream.to(exact), direction)[0]
    size = torch.linalg.vector_norm(stack, 1, dim=0, dtype=exact)
    if direction is None:
        error, size = error.norm(dim=-1), size.norm(dim=-1)
    else:
        error = error.abs()
        size = size + stream.to(exact).norm(dim=-1) * direction.norm(dim=-1)

    most = max(1e-3, 8 * torch.finfo(stream.dtype).eps)
    if (error > most * size).any():
        raise UserError(f"the writes miss the cached stream by {(error / size).max():.1g} of their "
                        "size: did a hook edit the stream, was dropout on, or is the cache of "
                        "another model? Cache this model in eval() and without edits")


def as_rows(write, direction):
    """A write [batch, pos, d_model] as one row, or its dot product with the direction."""
    if direction is None:
        return write[None]
    return (at_least_float32(write) * direction).sum(-1)[None]


def head_writes(z, W_O, direction):
    """Each head's write, z [batch, pos, head, d_head] @ W_O [head, d_head, d_model]: one row for
    each head, or its dot product with the direction."""
    if direction is None:
        return torch.einsum("bphd,hdm->hbpm", z, W_O)
    # each head's direction in the space of its z, [..., head, d_head]
    reads = torch.einsum("...m,hdm->...hd", direction, at_least_float32(W_O))
    return (at_least_float32(z) * reads).sum(-1).movedim(-1, 0)


def neuron_writes(post, W_out, direction):
    """Each neuron's write, post [batch, pos, d_mlp] times its row of W_out: one row for each
    neuron, or its dot product with the direction."""
    if direction is None:
        return torch.einsum("bpn,nm->nbpm", post, W_out)
    return (at_least_float32(post) * (direction @ at_least_float32(W_out).T)).movedim(-1, 0)


def accumulated_resid(model, cache, layer=-1, *, incl_mid=False, apply_ln=False):
    """The stream before each block, from the first up to `layer`: (stack, labels).

    layer: -1 or n_layers ends with the stream after the last block. incl_mid: include the streams
    between attention and MLP. apply_ln: apply the LayerNorm before block `layer` to each row, with
    the row's own mean and scale, as a logit lens does.
    Returns [row, batch, pos, d_model], labels "0_pre", "0_mid", …, "final_post".
    """
    layer = resolve_layer(model, cache, layer)
    rows = []
    labels = []
    for index in range(layer):
        rows.append(cache["resid_pre", index])
        labels.append(f"{index}_pre")
        if incl_mid and not model.cfg.attn_only:
            rows.append(cache["resid_mid", index])
            labels.append(f"{index}_mid")
    rows.append(stream_before(model, cache, layer))
    labels.append("final_post" if layer == model.cfg.n_layers else f"{layer}_pre")
    stack = torch.stack(rows)
    if apply_ln:
        stack = norm_before(model, layer).fused(stack).detach()
    return stack, labels


def stack_head_results(model, cache, layer=-1, *, project_output_onto=None):
    """The write of each head in the blocks before `layer`, without b_O: (stack, labels).

    Returns [head, batch, pos, d_model], labels "L0H0", "L0H1", …; with project_output_onto, as in
    `decomposition`, [head, batch, pos].
    """
    stack, labels = decomposition(model, cache, layer, unit="head",
                                  project_output_onto=project_output_onto)
    return select_rows("H", stack, labels)


def stack_neuron_results(model, cache, layer=-1, *, project_output_onto=None):
    """The write of each neuron in the blocks before `layer`, without b_out: (stack, labels).

    project_output_onto: as in `decomposition`. The products are taken before anything is expanded,
    so a neuron takes one number at each position instead of d_model. Returns [neuron, batch, pos
    (, d_model)], labels "L0N0", … Raises UserError for a model without MLPs.
    """
    if model.cfg.attn_only:
        raise UserError("attn_only=True: this model has no neurons; use stack_head_results")
    stack, labels = decomposition(model, cache, layer, unit="neuron",
                                  project_output_onto=project_output_onto)
    return select_rows("N", stack, labels)


def select_rows(letter, stack, labels):
    """The rows of a decomposition with labels such as "L0H1" (for the letter "H")."""
    chosen = [row for row, label in enumerate(labels) if label[0] == "L" and letter in label]
    return stack[chosen], [labels[row] for row in chosen]


def apply_ln_to_stack(model, cache, stack, labels, *, layer=-1, mlp_input=False, affine=True):
    """Applies the LayerNorm before block `layer` to each row, with the whole stream's scale.

    stack: [row, batch, pos, d_model]; it need not be a complete decomposition. affine: multiply by
    the LayerNorm's weights, and append its bias as a row, "ln_bias"; a complete decomposition then
    sums to the LayerNorm's output. Returns (stack, labels). Without LayerNorms, nothing changes.
    """
    layer = resolve_layer(model, cache, layer, mlp_input)
    check_tensor("stack", stack, "row batch pos d_model", is_float=True)
    if len(labels) != len(stack):
        raise UserError(f"{len(labels)} labels for {len(stack)} rows; pass one for each")
    norm = norm_before(model, layer, mlp_input)
    if model.cfg.norm == "none":
        return stack, list(labels)
    stack = (stack - stack.mean(-1, keepdim=True)) / scale_before(model, cache, layer, mlp_input)
    if not affine:
        return stack, list(labels)
    stack = stack * norm.w.detach()
    return torch.cat([stack, norm.b.detach().expand_as(stack[:1])]), [*labels, "ln_bias"]


def before_layer_norm(model, cache, direction, layer=-1, *, mlp_input=False):
    """The direction in the stream whose dot products equal those of `direction` after LayerNorm.

    For a write c: <(c - mean(c)) / scale * w, direction> = <c, (d - mean(d)) / scale>, where
    d = w * direction. LayerNorm's bias adds <b, direction> once. direction: [..., d_model],
    broadcast to [batch, pos, d_model]. Returns [batch, pos, d_model].
    """
    layer = resolve_layer(model, cache, layer, mlp_input)
    if model.cfg.norm == "none":
        return direction.expand_as(cache["embed"])
    direction = check_direction(direction, model.cfg.d_model)
    weighted = direction * norm_before(model, layer, mlp_input).w.detach()
    centred = weighted - weighted.mean(-1, keepdim=True)
    return centred / scale_before(model, cache, layer, mlp_input)


def norm_before(model, layer, mlp_input=False):
    """The LayerNorm that reads the stream there."""
    if layer == model.cfg.n_layers:
        return model.ln_final
    return model.blocks[layer].ln2 if mlp_input else model.blocks[layer].ln1


def scale_before(model, cache, layer, mlp_input=False):
    """The scale of that LayerNorm, [batch, pos, 1]."""
    if layer == model.cfg.n_layers:
        return cache["scale", None]
    return cache["scale", layer, "ln2" if mlp_input else "ln1"]


def stream_before(model, cache, layer):
    """The stream that block `layer` (or the unembedding) reads, [batch, pos, d_model]."""
    if layer < model.cfg.n_layers:
        return cache["resid_pre", layer]
    if layer:
        return cache["resid_post", layer - 1]
    embed = cache["embed"]
    return embed if model.position_embedding is None else embed + cache["pos_embed"]


def last_stream(model, cache):
    """The stream that the unembedding reads, [batch, pos, d_model]; None if the cache lacks it.
    """
    n_layers = model.cfg.n_layers
    name = f"blocks.{n_layers - 1}.hook_resid_post" if n_layers else "hook_embed"
    return stream_before(model, cache, n_layers) if name in cache else None


def resolve_layer(model, cache, layer, mlp_input=False):
    """The layer, with -1 replaced by n_layers. Raises UserError for other unknown layers, for an
    MLP's input if there is no MLP, and for a cache whose shapes are not the model's."""
    check_cache(cache)
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    heads = (model.cfg.n_heads, model.cfg.d_head)
    found = cache["embed"].shape[-1] if "hook_embed" in cache else d_model
    its_heads = heads
    if "blocks.0.attn.hook_z" in cache:
        its_heads = tuple(cache["z", 0].shape[-2:])
    if (cache.n_layers, found, its_heads) != (n_layers, d_model, heads):
        raise UserError(f"the cache is of {cache.n_layers} layers of {found} with {its_heads[0]} "
                        f"heads of {its_heads[1]}, the model has {n_layers} of {d_model} with "
                        f"{heads[0]} of {heads[1]}; take the cache from this model")
    if as_index(layer) is None or not -1 <= layer <= n_layers:
        raise UserError(f"layer={layer} does not exist; choose 0 to {n_layers}, or -1 for all")
    layer = n_layers if layer == -1 else layer
    if mlp_input and (layer == n_layers or model.cfg.attn_only):
        raise UserError(f"mlp_input=True: layer={layer} of this model has no MLP; leave it out")
    return layer


# Numbers about the stream


def norm_budget(model, cache, layer=-1):
    """Norm budget: each component's share of the stream's squared length, (shares, labels).

    <c, r> / |r|^2, [component, batch, pos]. The shares sum to 1; a part that writes against the
    stream has a negative share.
    """
    resid = stream_before(model, cache, resolve_layer(model, cache, layer))
    shares, labels = decomposition(model, cache, layer, project_output_onto=resid)
    return shares / at_least_float32(resid).pow(2).sum(-1), labels


def resid_norms(model, cache, *, incl_mid=False):
    """The norm of the stream before each block and at the end: ([row, batch, pos], labels)."""
    stack, labels = accumulated_resid(model, cache, incl_mid=incl_mid)
    return at_least_float32(stack).norm(dim=-1), labels


def cosine_by_layer(model, cache, *, incl_mid=False):
    """The cosine similarity of the streams before any two blocks, averaged over batch and
    positions: ([row, row], labels); 1 on the diagonal."""
    stack, labels = accumulated_resid(model, cache, incl_mid=incl_mid)
    unit = F.normalize(at_least_float32(stack), dim=-1)
    return torch.einsum("ibpm,jbpm->ij", unit, unit) / unit[0, ..., 0].numel(), labels


def singular_values(matrix):
    """The singular values, [..., n], in float32 at least. Raises UserError for a matrix that is not
    finite or is all zero, whose rank is undefined."""
    matrix = at_least_float32(torch.as_tensor(matrix))
    if matrix.ndim < 2 or not matrix.isfinite().all() or not matrix.any():
        raise UserError(f"the matrix {list(matrix.shape)} is all zero or not finite; pass [..., "
                        "rows, columns]")
    return torch.linalg.svdvals(matrix)


def effective_rank(matrix):
    """Effective rank: exp of the entropy of the normalised singular values.

    It estimates how many directions are in use. matrix: [..., rows, columns], not all zero. Returns
    [...], from 1 to the rank; equal singular values give the rank itself (Roy & Vetterli 2007).
    """
    singular = singular_values(matrix)
    shares = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def participation_ratio(matrix):
    """Participation ratio: (sum s^2)^2 / sum s^4 of the singular values s.

    It answers the same question as `effective_rank`, but for variance. matrix: [..., rows,
    columns], not all zero. Returns [...], from 1 to the rank.
    """
    power = singular_values(matrix).pow(2)
    return power.sum(-1).pow(2) / power.pow(2).sum(-1)
