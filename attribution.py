"""Who said it: a logit, or the difference of two, split among those who wrote to the stream.

The unembedding and, given its scale, the final LayerNorm are linear. So the logit difference is a
sum over writers, plus what LayerNorm's bias and the unembedding's say by themselves:

    logits[correct] - logits[wrong] = sum_c <c, d> + <b_ln, W_U[:, correct] - W_U[:, wrong]>
                                      + b_U[correct] - b_U[wrong]

with d the direction of `before_layer_norm`. No weight has to be folded first, and nothing is left
over. It says what was written, not what was needed: an effect through later layers is not in it.

Chapter: COURSE_ROADMAP.md, 8 (read)
Read before: residual_stream_analysis.py, metrics.py; after: logit_lens.py
Source: Elhage et al. 2021; Wang et al. 2022 (direct effect on the logit difference)
"""

import torch

from metrics import token_ids
from residual_stream_analysis import before_layer_norm, decomposition
from utils import UserError


@torch.no_grad()
def direct_logit_attribution(model, cache, correct, wrong=None, *, unit="component", pos=-1,
                             tokenizer=None):
    """What each writer adds to the logit of `correct`, less that of `wrong`: (attr, labels).

    cache: of `model`, as it is, with the activations of `decomposition` and ln_final's scale.
    correct, wrong: an id or a token for all rows, or one for each, [batch]; tokens as text need
    the tokenizer. unit: "component", "head", "neuron". pos: the position whose logits they are.
    Returns [row, batch], in nats, and labels; the last two rows are "ln_bias" and "b_U". The sum
    over rows is the model's own logit difference (without `wrong`, its logit).
    Raises UserError for what the cache lacks, and positions and tokens that are not there.
    """
    n_rows, n_pos = cache["embed"].shape[:2]
    if not -n_pos <= pos < n_pos:
        raise UserError(f"pos={pos} is outside of the {n_pos} positions of the cache")
    d_vocab = model.cfg.d_vocab
    W_U, b_U = model.W_U.detach(), model.b_U.detach()
    right = token_ids(correct, n_rows, d_vocab, tokenizer=tokenizer).to(W_U.device)
    direction, bias = W_U[:, right].T, b_U[right]  # [batch, d_model], [batch]
    if wrong is not None:
        other = token_ids(wrong, n_rows, d_vocab, tokenizer=tokenizer).to(W_U.device)
        direction, bias = direction - W_U[:, other].T, bias - b_U[other]
    here = cache.slice(pos=pos)
    onto = before_layer_norm(model, here, direction[:, None])
    attr, labels = decomposition(model, here, unit=unit, onto=onto)
    from_ln = torch.zeros_like(bias)
    if model.cfg.norm == "layernorm":
        from_ln = direction @ model.ln_final.b.detach()
    return torch.cat([attr[..., 0], from_ln[None], bias[None]]), [*labels, "ln_bias", "b_U"]
