"""Circuits in the weights: QK and OV matrices, composition, and exact re-parameterisations.

A head reads and writes through two products of rank d_head. W_Q W_K^T determines which source a
destination attends to, W_V W_O what is moved from there (`qk_circuit`, `ov_circuit`). The products
stay factored: every question about them needs only the small side.

Many different weights give the same predictions. LayerNorm's weights can be merged into the
matrices that read after it; a component that is constant along the stream is invisible to every
LayerNorm; a constant added to all logits is invisible to softmax; a value's bias passes through any
pattern unchanged. Each function here uses one of these freedoms to simplify the weights. It returns
a **new** model and its drift: how much the predictions changed, which should only be rounding.

    folded, drift = fold_layer_norm(model)
    scores = composition_scores(model, "K")             # which head could read which head's output

Chapter: COURSE_ROADMAP.md, 5 (the whole model) and 8 (read)
Prerequisites: attention.py, model.py
Next: optim.py
Source: Elhage et al. 2021 (circuits, composition, freedoms); names of TransformerLens
"""

import dataclasses
from dataclasses import dataclass

import torch

from metrics import copying_score
from model import GPT
from utils import (
    UserError,
    at_least_float32,
    check_choice,
    check_count,
    check_tensor,
    seeded_generator,
)


@dataclass(frozen=True)
class Drift:
    """The largest changes made by a re-parameterisation, over all tokens of a random text.

    log_probs: in nats. logits: also in nats, but at each position they may move by a constant.
    """

    log_probs: float
    logits: float


def fold_layer_norm(model):
    """(model, Drift): LayerNorm's weights and biases moved into the matrices that read after it.

    Every LayerNorm is left with w = 1 and b = 0, so W_Q, W_K, W_V, W_in and W_U alone determine
    what is read. Their columns are centred too, because a normalised stream has no mean. The result
    is untied and has attention biases and b_U. Raises UserError for a model without LayerNorms.
    """
    check_layer_norm(model, "fold")
    new = reshaped(model, tie_embeddings=False, attn_bias=True, unembed_bias=True)
    with torch.no_grad():
        for block in new.blocks:
            fold_(block.ln1, block.attn.W_QKV, block.attn.b_QKV)
            if not new.cfg.attn_only:
                fold_(block.ln2, block.mlp.W_in, block.mlp.b_in)
        fold_(new.ln_final, new.unembedding.W_U, new.unembedding.b_U)
    return new, drift(model, new)


def fold_(layer_norm, W, b):
    """Moves one LayerNorm into the matrix that reads after it, W [d_model, out] and b [out]. With n
    the normalised stream, (n * w + b_ln) @ W + b = n @ (w * W) + (b_ln @ W + b)."""
    b += layer_norm.b @ W
    W *= layer_norm.w[:, None]
    W -= W.mean(0)
    layer_norm.w.fill_(1.0)
    layer_norm.b.fill_(0.0)


def centre_writing_weights(model):
    """(model, Drift): everything written to the stream is centred, to sum to zero along d_model.

    Every reader is a LayerNorm, which subtracts the mean, so the mean was never read. The result is
    untied, and its positions are a learned table. Raises UserError for a model without LayerNorms.
    """
    check_layer_norm(model, "centre")
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
    """(model, Drift): W_U and b_U centred, to sum to zero along d_vocab_out.

    All logits of a position move by one constant, and no probability changes. A logit then compares
    its token with the average token. The result is untied. Raises UserError for a model with a
    single logit, of which nothing would be left.
    """
    if model.cfg.d_vocab_out == 1:
        raise UserError("d_vocab_out=1: centred, a single logit is always 0; leave W_U as it is")
    new = reshaped(model, tie_embeddings=False)
    with torch.no_grad():
        for weight in new.unembedding.parameters():
            weight -= weight.mean(-1, keepdim=True)
    return new, drift(model, new)


def fold_value_biases(model):
    """(model, Drift): the values' biases moved into b_O. A pattern's rows sum to one, so a value's
    bias reaches the output unchanged, wherever the head looks."""
    new = reshaped(model)
    with torch.no_grad():
        for block in new.blocks if new.cfg.attn_bias else []:
            attn = block.attn
            attn.b_O.add_(torch.einsum("hd,hdm->m", attn.b_V, attn.W_O))
            attn.b_V.zero_()
    return new, drift(model, new)


def check_layer_norm(model, what):
    """Raises UserError if the model has no LayerNorm."""
    if model.cfg.norm == "none":
        raise UserError(f"norm='none': there is no LayerNorm to {what} for; use a model with one")


def reshaped(model, **changes):
    """A copy of the model whose config differs by `changes`, computing the same function.

    New parameters (biases, or a table that was shared or fixed) get the value that the old model
    uses there.
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
        was_training = model.training  # dropout's noise would swamp the drift
        logits.append(model.eval()(tokens.to(model.W_E.device)))
        model.train(was_training)
    before, after = logits
    return Drift((before.log_softmax(-1) - after.log_softmax(-1)).abs().max().item(),
                 (before - after).abs().max().item())


# Circuits


class FactoredMatrix:
    """A matrix product A B that stays factored: A [..., rows, rank], B [..., rank, columns]."""

    def __init__(self, A, B):
        check_tensor("A", A, "... rows rank")
        check_tensor("B", B, "... rank columns")
        if A.shape[-1] != B.shape[-2]:
            raise UserError(f"A is {list(A.shape)} and B {list(B.shape)}; A needs as many columns "
                            "as B has rows")
        self.A = A
        self.B = B

    @property
    def AB(self):
        """The product itself, [..., rows, columns]."""
        return self.A @ self.B

    @property
    def T(self):
        """The transposed product."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def shape(self):
        """The shape of the product."""
        batch = torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        return (*batch, self.A.shape[-2], self.B.shape[-1])

    def __matmul__(self, other):
        """(A B) @ a tensor or another FactoredMatrix, factored."""
        check_product(self, other)
        if isinstance(other, FactoredMatrix):
            return FactoredMatrix(self.A @ (self.B @ other.A), other.B)
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other):
        """A tensor @ (A B), factored."""
        check_product(other, self)
        return FactoredMatrix(other @ self.A, self.B)

    def core(self):
        """(Q_A, small, Q_B) with A B = Q_A small Q_B^T and orthonormal columns in both Q."""
        A, B = check_finite(self.A), check_finite(self.B)
        Q_A, R_A = torch.linalg.qr(A)
        Q_B, R_B = torch.linalg.qr(B.mT)
        return Q_A, R_A @ R_B.mT, Q_B

    def svd(self):
        """(U, S, V) with A B = U diag(S) V^T; S [..., rank], the largest first."""
        Q_A, small, Q_B = self.core()
        U, S, Vh = torch.linalg.svd(small, full_matrices=False)
        return Q_A @ U, S, Q_B @ Vh.mT

    def norm(self):
        """The Frobenius norm, [...]."""
        return self.core()[1].norm(dim=(-2, -1))

    def eigenvalues(self):
        """The eigenvalues that can be nonzero, [..., rank], complex, computed from B A: if
        A B x = l x, then B A (B x) = l (B x). Raises UserError if the product is not square."""
        if self.shape[-1] != self.shape[-2]:
            raise UserError(f"{list(self.shape)} is not square and has no eigenvalues; use svd()")
        return torch.linalg.eigvals(check_finite(self.B) @ check_finite(self.A))


def check_product(one, other):
    """Raises UserError for matrices that cannot be multiplied."""
    if len(one.shape) < 2 or len(other.shape) < 2 or one.shape[-1] != other.shape[-2]:
        raise UserError(f"{list(one.shape)} @ {list(other.shape)} do not match; the first needs as "
                        "many columns as the second has rows")


def check_finite(matrix):
    """The matrix in float32 at least. Raises UserError if it holds NaN or infinity, on which LAPACK
    may never return, or crash the interpreter."""
    n_wrong = int((~matrix.isfinite()).sum())
    if n_wrong:
        raise UserError(f"{n_wrong} of {matrix.numel()} weights are NaN or infinite; load a model "
                        "whose training did not diverge")
    return at_least_float32(matrix)


def read_through(norm, W):
    """W [..., d_model, out] as it acts on the normalised stream, in float32 at least: multiplied by
    LayerNorm's weights and centred, because a normalised stream has no mean."""
    W = at_least_float32(W)
    if not hasattr(norm, "w"):
        return W
    weighted = at_least_float32(norm.w)[:, None] * W
    return weighted - weighted.mean(-2, keepdim=True)


@torch.no_grad()
def qk_circuits(model, layer):
    """The QK circuits W_Q W_K^T of all heads of a layer: a FactoredMatrix [head, d_model, d_model].

    An entry says how much a destination (row) with one direction in its normalised stream attends
    to a source (column) with another, times sqrt(d_head). Raises UserError for an unknown layer.
    """
    block = block_of(model, layer)
    return FactoredMatrix(read_through(block.ln1, block.attn.W_Q),
                          read_through(block.ln1, block.attn.W_K).mT)


@torch.no_grad()
def ov_circuits(model, layer):
    """The OV circuits W_V W_O of all heads of a layer: a FactoredMatrix [head, d_model, d_model].

    A row says what is written when the head attends to a source with one direction in its
    normalised stream. Raises UserError for an unknown layer.
    """
    block = block_of(model, layer)
    return FactoredMatrix(read_through(block.ln1, block.attn.W_V),
                          at_least_float32(block.attn.W_O))


def qk_circuit(model, layer, head):
    """`qk_circuits` of one head, [d_model, d_model]; for tokens, use W_E @ it @ W_E.T."""
    return select_head(qk_circuits(model, layer), head)


def ov_circuit(model, layer, head):
    """`ov_circuits` of one head, [d_model, d_model]. For tokens, use
    `W_E @ it @ read_through(ln_final, W_U)`: which tokens does each token make more likely?"""
    return select_head(ov_circuits(model, layer), head)


def select_head(circuits, head):
    """One head of a layer's circuits. Raises UserError for an unknown head."""
    head = check_count("head", head, 0, len(circuits.A) - 1)
    return FactoredMatrix(circuits.A[head], circuits.B[head])


def block_of(model, layer):
    """A block. Raises UserError for an unknown layer."""
    return model.blocks[check_count("layer", layer, 0, model.cfg.n_layers - 1)]


@torch.no_grad()
def ov_eigenvalue_score(model):
    """How much each head copies, [layer, head], from -1 to 1: `copying_score` of the eigenvalues of
    W_E OV W_U. Positive eigenvalues belong to vocabulary directions that raise themselves. Raises
    UserError for a model whose logits are not those of its tokens."""
    model.check_predicts_tokens("a head of such a model copies no token; see ov_circuit")
    W_E = at_least_float32(model.W_E)
    W_U = read_through(model.ln_final, model.W_U)
    scores = W_E.new_zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        scores[layer] = copying_score((W_E @ ov_circuits(model, layer) @ W_U).eigenvalues())
    return scores


@dataclass(frozen=True)
class Composition:
    """Composition scores of pairs of heads, and their z scores.

    Both are [layer, head, later layer, later head], and 0 unless the second layer is later. z: how
    many standard deviations a score is above that of random matrices.
    """

    scores: torch.Tensor
    z: torch.Tensor


@torch.no_grad()
def composition_scores(model, kind, *, n_draws=300, seed=0):
    """Composition scores: how much a later head's Q, K or V reads of an earlier head's output.

    |W_A W_B| / (|W_A| |W_B|) with Frobenius norms. W_A is the earlier head's OV; W_B is the later
    head's QK ("Q"), QK^T ("K") or OV ("V"). All are taken without the mean along d_model, which no
    LayerNorm passes on. The random matrices have the heads' shapes and independent normal entries;
    their mean squared score is 1 / d_model (1 / (d_model - 1) without the mean).
    A large z alone is no evidence of a circuit. Random matrices favour no direction of the stream,
    but trained ones do, so any two heads that use the same few directions get a large z. Compare
    with other pairs of heads. Returns a Composition. Raises UserError for another kind, and for
    fewer than two draws.
    """
    check_choice("kind", kind, ("Q", "K", "V"))
    n_draws = check_count("n_draws", n_draws, least=2)  # one draw has no standard deviation

    # the scores of random matrices
    cfg = model.cfg
    generator = seeded_generator(seed)
    shape = (n_draws, cfg.d_model - (cfg.norm != "none"), cfg.d_head)
    random = [torch.randn(shape, generator=generator) for _ in range(4)]
    null = composition_ratio(FactoredMatrix(random[0], random[1].mT),
                             FactoredMatrix(random[2], random[3].mT))

    # every pair of an earlier and a later layer, all heads at once
    scores = at_least_float32(model.W_E.new_zeros(
        cfg.n_layers, cfg.n_heads, cfg.n_layers, cfg.n_heads))
    z = scores.clone()
    for later in range(cfg.n_layers):
        reads = ov_read(model, later) if kind == "V" else qk_circuits(model, later)
        reads = reads.T if kind == "K" else reads
        for layer in range(later):
            writes = ov_read(model, layer)
            pairs = FactoredMatrix(writes.A[:, None], writes.B[:, None])  # [head, later head, …]
            scores[layer, :, later] = composition_ratio(pairs, reads)
            z[layer, :, later] = (scores[layer, :, later] - null.mean()) / null.std()
    return Composition(scores, z)


def ov_read(model, layer):
    """`ov_circuits` as later LayerNorms see them: their output without its mean."""
    circuits = ov_circuits(model, layer)
    if model.cfg.norm == "none":
        return circuits
    return FactoredMatrix(circuits.A, circuits.B - circuits.B.mean(-1, keepdim=True))


def composition_ratio(one, other):
    """|one other| / (|one| |other|) of two FactoredMatrix."""
    return (one @ other).norm() / (one.norm() * other.norm())


@torch.no_grad()
def svd_vocab(model, layer, head, tokenizer, *, n_directions=4, top_k=8):
    """A head's strongest OV directions, read as tokens: a list of (strength, read, written).

    strength: the singular value of OV. read: the tokens whose embeddings have most of the input
    direction. written: the tokens whose logits rise most. The sign of a direction is arbitrary; it
    is chosen so that the largest change of a logit is a rise. Raises UserError for a model whose
    logits are not those of its tokens.
    """
    model.check_predicts_tokens("see ov_circuit(...).svd(), whose directions need no words")
    if not hasattr(tokenizer, "to_str_tokens"):
        raise UserError(f"tokenizer is a {type(tokenizer).__name__}; pass the one that load_model "
                        "returns")
    n_directions = check_count("n_directions", n_directions)
    top_k = check_count("top_k", top_k)
    U, S, V = ov_circuit(model, layer, head).svd()
    read = at_least_float32(model.W_E) @ U  # [d_vocab, rank]
    written = V.mT @ read_through(model.ln_final, model.W_U)  # [rank, d_vocab]

    def top_tokens(values):
        top = values.topk(min(top_k, len(values))).indices.tolist()
        return tokenizer.to_str_tokens(top, show_unknown=True)

    directions = []
    for i in range(min(n_directions, len(S))):
        sign = written[i, written[i].abs().argmax()].sign()
        directions.append((S[i].item(), top_tokens(sign * read[:, i]),
                           top_tokens(sign * written[i])))
    return directions
