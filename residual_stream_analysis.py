"""Take the residual stream apart into what each part, each head and each neuron wrote to it.

The last stream is the embedding plus what each part wrote, so whatever reads it linearly can be
split among the writers, exactly. The final LayerNorm is no obstacle: given its scale, which the
cache holds, it is linear too.

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
    """What each part has written to the stream that block `layer` reads: (stack, labels).

    cache: an ActivationCache of `model`, LayerNorm unfolded or not. layer: 0 is the embedding
    alone; -1 or n_layers, all that the unembedding reads. mlp_input: what the block has written
    with its attention too. apply_ln: as the LayerNorm there reads it (`apply_ln_to_stack`).
    Returns [component, batch, pos, d_model], which sums to the stream, and a label for each:
    "embed", "pos_embed", "0_attn_out", "0_mlp_out", …
    Raises UserError for a layer that is not there, a cache of another model, and writes that do not
    sum to the stream that was cached.
    """
    stack, labels = decomposition(model, cache, layer, mlp_input=mlp_input)
    if apply_ln:
        return apply_ln_to_stack(model, cache, stack, labels, layer=layer, mlp_input=mlp_input)
    return stack, labels


def full_decomposition(model, cache, layer=-1, mlp_input=False, *, expand_neurons=True,
                       project_output_onto=None):
    """`decompose_resid` with each head apart, and each neuron too unless told otherwise.

    The biases of what was taken apart are one row, "biases". project_output_onto: as in
    `decomposition`. Give it for a large model: the neurons of GPT-2 small at 64 tokens take 7 GB
    without it.
    """
    unit = "neuron" if expand_neurons else "head"
    return decomposition(model, cache, layer, unit=unit, mlp_input=mlp_input,
                         project_output_onto=project_output_onto)


def decomposition(model, cache, layer=-1, *, unit="component", mlp_input=False,
                  project_output_onto=None):
    """The writes to the stream before block `layer`, taken apart down to `unit`: (stack, labels).

    unit: "component", "head" (the rest as components), or "neuron" (heads too).
    project_output_onto: [batch, pos, d_model], or what broadcasts to it: the direction that each
    write is multiplied with; the writes themselves are then never built.
    Returns [component, batch, pos, d_model], or with a direction [component, batch, pos].
    Raises as `decompose_resid`, and for an unknown unit.
    """
    check_choice("unit", unit, UNITS)
    layer = resolve_layer(model, cache, layer, mlp_input)
    direction = project_output_onto
    if direction is not None:
        direction = check_direction(direction, model.cfg.d_model)
        check_fits(direction, cache["embed"])

    # where the stream begins
    rows = [as_rows(cache["embed"], direction)]
    labels = ["embed"]
    if model.position_embedding is not None:
        rows.append(as_rows(cache["pos_embed"], direction))
        labels.append("pos_embed")

    # what each block adds; with mlp_input, of the last one its attention alone
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
    if unit != "neuron" or direction is not None:  # neurons apart are too many to sum them twice
        check_sum(stack, stream_if_kept(model, cache, layer, mlp_input), direction)
    return stack, labels


def check_direction(direction, d_model):
    """The direction [..., d_model] in float32 at least. Raises UserError for another width."""
    if not isinstance(direction, torch.Tensor) or direction.shape[-1:] != (d_model,):
        found = getattr(direction, "shape", None)
        raise UserError(f"the direction is {found and list(found)}; pass a tensor [..., "
                        f"{d_model}], what broadcasts to [batch, pos, d_model]")
    return at_least_float32(direction)


def check_fits(direction, stream):
    """Raises UserError unless the direction broadcasts to the stream."""
    if broadcast_shape(direction, stream) != stream.shape:
        raise UserError(f"the direction is {list(direction.shape)}, the stream "
                        f"{list(stream.shape)}; pass one for each position, or [d_model]")


def stream_if_kept(model, cache, layer, mlp_input):
    """The stream there, [batch, pos, d_model], or None where the cache lacks it."""
    if mlp_input:
        return cache.get(("resid_mid", layer))
    if layer == model.cfg.n_layers:
        return cache.get(("resid_post", layer - 1))
    return cache.get(("resid_pre", layer))


def check_sum(stack, stream, direction):
    """Raises UserError where the rows do not sum to the stream [batch, pos, d_model], or where
    their products with `direction` do not sum to its product; rounding aside."""
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
    """A write [batch, pos, d_model] as one row, or its product with the direction."""
    if direction is None:
        return write[None]
    return (at_least_float32(write) * direction).sum(-1)[None]


def head_writes(z, W_O, direction):
    """What each head writes, z [batch, pos, head, d_head] @ W_O [head, d_head, d_model]: one row a
    head, or its product with the direction."""
    if direction is None:
        return torch.einsum("bphd,hdm->hbpm", z, W_O)
    # what each head's z counts for, [..., head, d_head]
    reads = torch.einsum("...m,hdm->...hd", direction, at_least_float32(W_O))
    return (at_least_float32(z) * reads).sum(-1).movedim(-1, 0)


def neuron_writes(post, W_out, direction):
    """What each neuron writes, post [batch, pos, d_mlp] times its row of W_out: one row a neuron,
    or its product with the direction."""
    if direction is None:
        return torch.einsum("bpn,nm->nbpm", post, W_out)
    return (at_least_float32(post) * (direction @ at_least_float32(W_out).T)).movedim(-1, 0)


def accumulated_resid(model, cache, layer=-1, *, incl_mid=False, apply_ln=False):
    """The stream before each block from the first up to `layer`: (stack, labels).

    layer: -1 or n_layers ends with the stream after the last block. incl_mid: the streams between
    attention and MLP too. apply_ln: each row as the LayerNorm before block
    `layer` would read it, each with its own mean and scale (what a logit lens does).
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
    """What each head of the blocks before `layer` has written, without b_O: (stack, labels).

    Returns [head, batch, pos, d_model], labels "L0H0", "L0H1", …; with project_output_onto, as in
    `decomposition`, [head, batch, pos].
    """
    stack, labels = decomposition(model, cache, layer, unit="head",
                                  project_output_onto=project_output_onto)
    return select_rows("H", stack, labels)


def stack_neuron_results(model, cache, layer=-1, *, project_output_onto=None):
    """What each neuron of the blocks before `layer` has written, without b_out: (stack, labels).

    project_output_onto: as in `decomposition`; the products are taken before anything is expanded,
    so that a neuron costs one number a position and not d_model. Returns [neuron, batch, pos
    (, d_model)], labels "L0N0", … Raises UserError for a model without MLPs.
    """
    if model.cfg.attn_only:
        raise UserError("attn_only=True: this model has no neurons; use stack_head_results")
    stack, labels = decomposition(model, cache, layer, unit="neuron",
                                  project_output_onto=project_output_onto)
    return select_rows("N", stack, labels)


def select_rows(letter, stack, labels):
    """The rows of a decomposition whose label is a layer, that letter and a number."""
    chosen = [row for row, label in enumerate(labels) if label[0] == "L" and letter in label]
    return stack[chosen], [labels[row] for row in chosen]


def apply_ln_to_stack(model, cache, stack, labels, *, layer=-1, mlp_input=False, affine=True):
    """Each row as the LayerNorm before block `layer` reads it, with the whole stream's scale.

    stack: [row, batch, pos, d_model], which need not be all that was written. affine: multiply by
    the LayerNorm's weights, and append its bias as a row, "ln_bias": the rows of a whole
    decomposition then sum to its output. Returns (stack, labels). Without LayerNorms, as it was.
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
    """The direction in the stream itself whose readings are those of `direction` after LayerNorm.

    For a write c: <(c - mean(c)) / scale * w, direction> = <c, (d - mean(d)) / scale>, where
    d = w * direction. LayerNorm's bias adds <b, direction> once. direction: [..., d_model], what
    broadcasts to [batch, pos, d_model]. Returns [batch, pos, d_model].
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
    """What that LayerNorm divides by, [batch, pos, 1]."""
    if layer == model.cfg.n_layers:
        return cache["scale", None]
    return cache["scale", layer, "ln2" if mlp_input else "ln1"]


def stream_before(model, cache, layer):
    """The stream that block `layer` reads, or the unembedding, [batch, pos, d_model]."""
    if layer < model.cfg.n_layers:
        return cache["resid_pre", layer]
    if layer:
        return cache["resid_post", layer - 1]
    embed = cache["embed"]
    return embed if model.position_embedding is None else embed + cache["pos_embed"]


def last_stream(model, cache):
    """The stream that the unembedding reads, [batch, pos, d_model]; None where the cache lacks it.
    """
    n_layers = model.cfg.n_layers
    name = f"blocks.{n_layers - 1}.hook_resid_post" if n_layers else "hook_embed"
    return stream_before(model, cache, n_layers) if name in cache else None


def resolve_layer(model, cache, layer, mlp_input=False):
    """layer with -1 as n_layers; raises UserError for others that are not there, for an MLP's input
    where there is no MLP, and for a cache whose shapes are not the model's."""
    check_cache(cache)
    n_layers, d_model, n_heads = model.cfg.n_layers, model.cfg.d_model, model.cfg.n_heads
    found = cache["embed"].shape[-1] if "hook_embed" in cache else d_model
    heads = cache["z", 0].shape[-2] if "blocks.0.attn.hook_z" in cache else n_heads
    if (cache.n_layers, found, heads) != (n_layers, d_model, n_heads):
        raise UserError(f"the cache is of {cache.n_layers} layers of {found} with {heads} heads, "
                        f"the model has {n_layers} of {d_model} with {n_heads}; take the cache "
                        "from this model")
    if as_index(layer) is None or not -1 <= layer <= n_layers:
        raise UserError(f"layer={layer} is not there; choose 0 to {n_layers}, or -1 for all")
    layer = n_layers if layer == -1 else layer
    if mlp_input and (layer == n_layers or model.cfg.attn_only):
        raise UserError(f"mlp_input=True: layer={layer} of this model has no MLP; leave it out")
    return layer


# Numbers about the stream


def norm_budget(model, cache, layer=-1):
    """The share of each component in the stream's squared length: (shares, labels).

    <c, r> / |r|^2, [component, batch, pos]: they sum to 1; a part that writes against the stream
    has a negative one.
    """
    resid = stream_before(model, cache, resolve_layer(model, cache, layer))
    shares, labels = decomposition(model, cache, layer, project_output_onto=resid)
    return shares / at_least_float32(resid).pow(2).sum(-1), labels


def resid_norms(model, cache, *, incl_mid=False):
    """The length of the stream before each block and at the end: ([row, batch, pos], labels)."""
    stack, labels = accumulated_resid(model, cache, incl_mid=incl_mid)
    return at_least_float32(stack).norm(dim=-1), labels


def cosine_by_layer(model, cache, *, incl_mid=False):
    """How alike the streams before any two blocks are: the cosine, averaged over batch and
    positions, ([row, row], labels); 1 on the diagonal."""
    stack, labels = accumulated_resid(model, cache, incl_mid=incl_mid)
    unit = F.normalize(at_least_float32(stack), dim=-1)
    return torch.einsum("ibpm,jbpm->ij", unit, unit) / unit[0, ..., 0].numel(), labels


def singular_values(matrix):
    """The singular values, [..., n], in float32 at least. Raises UserError for a matrix that is not
    finite or all zero, which has no rank to speak of."""
    matrix = at_least_float32(torch.as_tensor(matrix))
    if matrix.ndim < 2 or not matrix.isfinite().all() or not matrix.any():
        raise UserError(f"the matrix {list(matrix.shape)} is all zero or not finite; pass [..., "
                        "rows, columns]")
    return torch.linalg.svdvals(matrix)


def effective_rank(matrix):
    """exp of the entropy of the singular values' shares: how many directions are in use.

    matrix: [..., rows, columns], not all zero. Returns [...], from 1 to the rank; equal singular
    values give the rank itself (Roy & Vetterli 2007).
    """
    singular = singular_values(matrix)
    shares = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def participation_ratio(matrix):
    """(sum s^2)^2 / sum s^4 of the singular values s: the same question, asked of the variance.

    matrix: [..., rows, columns], not all zero. Returns [...], from 1 to the rank.
    """
    power = singular_values(matrix).pow(2)
    return power.sum(-1).pow(2) / power.pow(2).sum(-1)
