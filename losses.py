"""The numbers that training makes small: cross-entropy in nats, and the KL divergence.

Chapter: COURSE_ROADMAP.md, 1 (the mathematical language)
Prerequisites: utils.py
Next: tokenizer.py
Source: Shannon 1948; Kullback & Leibler 1951
"""

from utils import check_choice

REDUCTIONS = ("none", "mean")


def per_token_loss(logits, targets):
    """The surprise at each token, -log p(target), in nats.

    logits: [..., d_vocab], unnormalised; targets: [...], integer ids.
    Returns [...].
    """
    log_probs = logits.log_softmax(-1)
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits, targets):
    """The mean surprise, in nats a token: what training minimises.

    logits: [..., d_vocab]; targets: [...], the token that follows at each position.
    Returns a scalar. A uniform guess costs ln d_vocab.
    """
    return per_token_loss(logits, targets).mean()


def next_token_loss(logits, tokens, *, reduction="mean"):
    """The mean surprise at the next token of a text, in nats: position i is scored on token i + 1.

    logits: [..., batch, pos, d_vocab]; tokens: [batch, pos], those that gave the logits. The last
    position predicts a token that is not there, and is left out.
    Returns a scalar, or with reduction="none" each text's own mean, [..., batch].
    Raises UserError for another reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    targets = tokens[:, 1:].expand(*logits.shape[:-3], -1, -1)
    losses = per_token_loss(logits[..., :-1, :], targets)  # [..., batch, pos - 1]

    return losses.mean() if reduction == "mean" else losses.mean(-1)


def kl_divergence(p_logits, q_logits, *, pos=None, reduction="none"):
    """KL(p || q) = sum p (log p - log q): the nats lost by coding p with q's distribution.

    p_logits, q_logits: [..., d_vocab], unnormalised, of shapes that broadcast. The model that is
    judged is q, and what it should say is p: `kl_divergence(clean_logits, logits, pos=-1)`.
    pos: an int, a slice or a list of positions of [..., pos, d_vocab]; None for all.
    Returns [...] without d_vocab (and, for an int, without pos), or with reduction="mean" a scalar;
    0 where p and q agree and never negative but for rounding.
    Raises UserError for another reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if pos is not None:
        p_logits, q_logits = p_logits[..., pos, :], q_logits[..., pos, :]

    p_log, q_log = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p = p_log.exp()
    terms = (p * (p_log - q_log)).masked_fill(p == 0, 0.0)  # what p rules out costs nothing
    divergence = terms.sum(-1)

    return divergence.mean() if reduction == "mean" else divergence
