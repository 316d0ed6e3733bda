"""What a model is trained to make small: cross-entropy in nats, and the KL divergence.

Chapter: COURSE_ROADMAP.md, 1 (the mathematical language)
Prerequisites: utils.py
Next: tokenizer.py
Source: Shannon 1948; Kullback & Leibler 1951
"""


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


def next_token_loss(logits, tokens):
    """The mean surprise of a text at itself: position i is scored on token i + 1.

    logits: [batch, pos, d_vocab]; tokens: [batch, pos], those that gave the logits.
    Returns a scalar, in nats a token; the last position predicts nothing that is known.
    """
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def kl_divergence(p_logits, q_logits):
    """KL(p || q) = sum p (log p - log q): the nats lost by coding p with q's distribution.

    p_logits, q_logits: [..., d_vocab], unnormalised.
    Returns [...], 0 where they agree and never negative but for rounding.
    """
    p_log, q_log = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p = p_log.exp()
    return (p * (p_log - q_log)).masked_fill(p == 0, 0.0).sum(-1)  # the impossible costs nothing
