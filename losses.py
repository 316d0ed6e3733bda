"""Loss functions: cross-entropy in nats, and the KL divergence.

Softmax and logarithms are computed in float32 at least, whatever the precision of the logits:
bfloat16 has only three digits, and a KL computed in it can come out negative.

Chapter: COURSE_ROADMAP.md, 1 (the mathematical language)
Prerequisites: utils.py
Next: tokenizer.py
Source: Shannon 1948; Kullback & Leibler 1951
"""

import torch

from positions import at_positions, check_key_mask, choose_positions, is_single
from utils import UserError, broadcast_shape, check_choice, check_tensor

REDUCTIONS = ("none", "mean")
IGNORED = -100  # a target that does not count: padding, or a prompt that is not to be learned


def log_probabilities(logits):
    """log softmax over the vocabulary, in float32 at least. logits: [..., d_vocab]."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def per_token_loss(logits, targets):
    """The loss of each token, -log p(target), in nats (its surprisal).

    logits: [..., d_vocab], unnormalised; targets: [...], integer ids, or IGNORED if there is
    nothing to predict. Returns [...], in float32 at least, with 0 for ignored targets.
    Raises UserError unless there is one target for each prediction, and if targets are not ids.
    """
    check_tensor("logits", logits, "... d_vocab", is_float=True)
    check_tensor("targets", targets, "...")
    if logits.shape[:-1] != targets.shape:
        raise UserError(f"logits is {list(logits.shape)} and targets {list(targets.shape)}; pass "
                        "one target for each prediction")
    counts = targets != IGNORED
    ids = targets.masked_fill(~counts, 0)
    try:
        losses = -log_probabilities(logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    except RuntimeError:  # checked only on failure: reading ids would wait for the GPU
        if ids.is_floating_point() or ids.min() < 0 or ids.max() >= logits.shape[-1]:
            raise UserError(f"targets are {ids.dtype} from {ids.min().item()} to "
                            f"{ids.max().item()}; pass ids below {logits.shape[-1]}, or "
                            f"{IGNORED} if there is nothing to predict") from None
        raise
    return losses.masked_fill(~counts, 0.0)


def cross_entropy(logits, targets):
    """Cross-entropy: the mean loss over the targets that count, in nats per token.

    This is what training minimises. logits: [..., d_vocab]; targets: [...], the next token at each
    position, or IGNORED. Returns a scalar. A uniform guess has loss ln d_vocab; if every target is
    ignored, it is 0.
    """
    losses = per_token_loss(logits, targets)
    n_targets = (targets != IGNORED).sum().clamp(min=1)
    return losses.sum() / n_targets


def next_token_loss(logits, tokens, *, key_mask=None, reduction="mean"):
    """The mean next-token loss of a text, in nats: position i predicts token i + 1.

    logits: [..., batch, pos, d_vocab]; tokens: [batch, pos], those that gave the logits. The last
    position has no next token and is left out. key_mask: [batch, pos], True for real tokens;
    padding neither predicts nor is predicted.
    Returns a scalar, or with reduction="none" each text's own mean, [..., batch].
    Raises UserError for another reduction, and for logits of other texts.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_tensor("logits", logits, "... batch pos d_vocab", is_float=True)
    check_tensor("tokens", tokens, "batch pos")
    if tokens.is_floating_point() or tokens.shape[1] < 2:
        raise UserError(f"tokens is {list(tokens.shape)} {tokens.dtype}; pass ids of texts of two "
                        "tokens or more, since one alone predicts nothing")
    if logits.shape[-3:-1] != tokens.shape:
        raise UserError(f"logits is {list(logits.shape)} for tokens {list(tokens.shape)}; pass the "
                        "logits [batch, pos, d_vocab] of these tokens")
    check_key_mask(key_mask, tokens)
    if key_mask is not None and reduction == "none" and not key_mask[:, -2:].all():
        raise UserError("a text has one real token, which predicts nothing; leave it out, or use "
                        "reduction='mean', which does")
    targets = tokens[:, 1:].long()
    if key_mask is not None:
        targets = targets.masked_fill(~key_mask[:, :-1], IGNORED)
    targets = targets.expand(*logits.shape[:-3], -1, -1)
    losses = per_token_loss(logits[..., :-1, :], targets)  # [..., batch, pos - 1]

    counts = targets != IGNORED
    if reduction == "mean":
        return losses.sum() / counts.sum()
    return losses.sum(-1) / counts.sum(-1)


def kl_divergence(p_logits, q_logits, *, pos=None, reduction="none"):
    """KL divergence: KL(p || q) = sum p (log p - log q), the nats lost by coding p with q.

    p_logits, q_logits: [..., d_vocab], unnormalised, of shapes that broadcast. q is the prediction
    under test and p the reference: `kl_divergence(clean_logits, logits, pos=-1)`.
    pos: for [..., batch, pos, d_vocab], an int, a slice or a list, or a tensor [batch] with one for
    each row; None for all positions.
    Returns [...] without d_vocab, and without pos if one position per row is selected; with
    reduction="mean" a scalar. The result is in float32 at least, 0 if p and q agree, and negative
    only by rounding. Raises UserError for another reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    shape = "... d_vocab" if pos is None else "... batch pos d_vocab"
    for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        check_tensor(name, logits, shape, is_float=True)
    other_vocabulary = p_logits.shape[-1] != q_logits.shape[-1]
    if other_vocabulary or broadcast_shape(p_logits, q_logits) is None:
        raise UserError(f"p_logits is {list(p_logits.shape)} and q_logits {list(q_logits.shape)}; "
                        "pass logits of the same tokens and vocabulary")
    if pos is not None:
        if p_logits.shape[-2:-1] != q_logits.shape[-2:-1]:
            raise UserError(f"p_logits is {list(p_logits.shape)} and q_logits "
                            f"{list(q_logits.shape)}; with pos both need equally many positions")
        p_logits, q_logits = torch.broadcast_tensors(p_logits, q_logits)
        chosen = choose_positions(pos, q_logits.shape[-2], q_logits.shape[-3])
        p_logits, q_logits = at_positions(p_logits, chosen), at_positions(q_logits, chosen)

    p_log, q_log = log_probabilities(p_logits), log_probabilities(q_logits)
    p = p_log.exp()
    terms = (p * (p_log - q_log)).masked_fill(p == 0, 0.0)  # what p excludes costs nothing
    divergence = terms.sum(-1)  # [..., batch, pos]
    if pos is not None and is_single(pos):
        divergence = divergence.squeeze(-1)
    return divergence.mean() if reduction == "mean" else divergence
