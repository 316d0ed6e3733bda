"""The same function in other weights: exact re-parameterisations that make circuits easier to read.

Many weights give the same predictions. LayerNorm's gain can live in the matrices that read after
it; what is constant along the stream is invisible to every LayerNorm; a constant added to all
logits is invisible to softmax; a value's bias passes through any pattern unchanged. Each function
here moves such a freedom to where it does no harm, returns a **new** model, and reports by how much
its predictions drifted, which should be rounding.

    folded, drift = fold_layer_norm(model)

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Read before: model.py; after: attribution of what each part says, in later chapters
Source: Elhage et al. 2021 (which degrees of freedom a circuit has); names of TransformerLens
"""

import dataclasses
from dataclasses import dataclass

import torch

from model import GPT
from utils import UserError, seeded_generator


@dataclass(frozen=True)
class Drift:
    """The largest changes that a re-parameterisation made, over all tokens of a random text.

    log_probs: in nats. logits: in nats too, but free to move by a constant a position.
    """

    log_probs: float
    logits: float


def fold_layer_norm(model):
    """(model, Drift): LayerNorm's weights and biases moved into the matrices that read after it.

    Every LayerNorm is left with w = 1 and b = 0, so that W_Q, W_K, W_V, W_in and W_U say alone what
    is read; their columns are centred too, since a normalised stream has no mean to read. The
    result is untied and has attention biases and b_U. Raises UserError without LayerNorms.
    """
    need_layer_norm(model, "fold")
    new = reshaped(model, tie_embeddings=False, attn_bias=True, unembed_bias=True)
    with torch.no_grad():
        for block in new.blocks:
            fold_(block.ln1, block.attn.W_QKV, block.attn.b_QKV)
            if not new.cfg.attn_only:
                fold_(block.ln2, block.mlp.W_in, block.mlp.b_in)
        fold_(new.ln_final, new.unembedding.W_U, new.unembedding.b_U)
    return new, drift(model, new)


def fold_(layer_norm, W, b):
    """Moves one LayerNorm into what reads after it, W [d_model, out] and b [out]: with n the
    normalised stream, (n * w + b_ln) @ W + b = n @ (w * W) + (b_ln @ W + b)."""
    b += layer_norm.b @ W
    W *= layer_norm.w[:, None]
    W -= W.mean(0)
    layer_norm.w.fill_(1.0)
    layer_norm.b.fill_(0.0)


def centre_writing_weights(model):
    """(model, Drift): all that is written to the stream made to sum to zero along d_model.

    Every reader is a LayerNorm, which subtracts the mean: it was never read. The result is untied,
    and its positions are a learned table. Raises UserError without LayerNorms.
    """
    need_layer_norm(model, "centre")
    positions = "none" if model.position_embedding is None else "learned"
    new = reshaped(model, tie_embeddings=False, positions=positions)
    with torch.no_grad():
        writers = [new.W_E] + ([] if positions == "none" else [new.W_pos])
        for block in new.blocks:
            parts = [block.attn] + ([] if new.cfg.attn_only else [block.mlp])
            for part in parts:
                writers += [weight for name, weight in part.named_parameters()
                            if name in ("W_heads_out", "b_heads_out", "W_out", "b_out")]
        for weight in writers:
            weight -= weight.mean(-1, keepdim=True)
    return new, drift(model, new)


def centre_unembed(model):
    """(model, Drift): W_U and b_U made to sum to zero along d_vocab.

    All logits of a position move by one constant, and no probability does; a logit then says how
    much likelier than the average token. The result is untied.
    """
    new = reshaped(model, tie_embeddings=False)
    with torch.no_grad():
        for weight in new.unembedding.parameters():
            weight -= weight.mean(-1, keepdim=True)
    return new, drift(model, new)


def fold_value_biases(model):
    """(model, Drift): the values' biases moved into b_O, which is where they end whatever a head
    looks at: a pattern's rows sum to one."""
    new = reshaped(model)
    with torch.no_grad():
        for block in new.blocks if new.cfg.attn_bias else []:
            attn = block.attn
            attn.b_O.add_(torch.einsum("hd,hdm->m", attn.b_V, attn.W_O))
            attn.b_V.zero_()
    return new, drift(model, new)


def need_layer_norm(model, what):
    """Raises UserError where the model has none."""
    if model.cfg.norm == "none":
        raise UserError(f"norm='none': there is no LayerNorm to {what} for; take a model with one")


def reshaped(model, **changes):
    """A copy of the model whose config differs by `changes` and which computes the same.

    What is new in it (biases, a table of its own where one was shared or fixed) gets the value that
    the old model has there.
    """
    new = GPT(dataclasses.replace(model.cfg, **changes), seed=None).to(model.W_E)
    weights = model.state_dict()
    for name, weight in new.state_dict().items():
        if name == "unembedding.W_U":
            weights[name] = model.W_U
        elif name == "position_embedding.W_pos":
            weights[name] = model.W_pos
        elif name not in weights:
            weights[name] = torch.zeros_like(weight)  # biases that the old model lacks
    new.load_weights_(weights, "the model")
    return new.train(model.training)


@torch.no_grad()
def drift(old, new):
    """The Drift between two models of the same vocabulary, on two random texts."""
    n_tokens = min(old.cfg.n_ctx, 64)
    tokens = torch.randint(old.cfg.d_vocab, (2, n_tokens), generator=seeded_generator(0))
    logits = []
    for model in (old, new):
        was_training = model.training  # dropout would drown what is measured
        logits.append(model.eval()(tokens.to(model.W_E.device)))
        model.train(was_training)
    before, after = logits
    return Drift((before.log_softmax(-1) - after.log_softmax(-1)).abs().max().item(),
                 (before - after).abs().max().item())
