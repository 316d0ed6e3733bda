"""Other right solutions of the exercises of chapter 8."""

import torch
import torch.nn.functional as F


def logit_difference_as_gather(logits, correct, wrong):
    pair = torch.stack([correct, wrong], -1)
    chosen = logits[:, -1].gather(-1, pair)
    return chosen[:, 0] - chosen[:, 1]


def logit_difference_as_log_probs(logits, correct, wrong):
    logs = logits[:, -1].log_softmax(-1)  # the normaliser cancels
    return torch.stack([row[c] - row[w] for row, c, w in zip(logs, correct, wrong, strict=True)])


def target_rank_as_argsort(logits, target):
    order = logits[:, -1].argsort(-1, descending=True)
    return (order == target[:, None]).int().argmax(-1)


def decompose_stream_as_cat(model, cache):
    rows = [cache["embed"][None], cache["pos_embed"][None]]
    for layer in range(model.cfg.n_layers):
        rows += [cache["attn_out", layer].unsqueeze(0), cache["mlp_out", layer].unsqueeze(0)]
    return torch.cat(rows, dim=0)


def read_through_norm_as_projection(stack, scale, w):
    n = stack.shape[-1]
    centring = torch.eye(n) - torch.full((n, n), 1 / n)
    return (stack @ centring) * w / scale


def attribute_logits_as_loop(model, cache, correct, wrong):
    parts = [cache["embed"], cache["pos_embed"]]
    for layer in range(model.cfg.n_layers):
        parts += [cache["attn_out", layer], cache["mlp_out", layer]]
    scale = cache["scale", None][:, -1]
    direction = model.W_U[:, correct].T - model.W_U[:, wrong].T
    rows = []
    for part in parts:
        end = part[:, -1]
        read = (end - end.mean(-1, keepdim=True)) / scale * model.ln_final.w
        rows.append(torch.einsum("bm,bm->b", read, direction))
    rows.append((model.ln_final.b * direction).sum(-1))
    return torch.stack(rows)


def read_early_as_products(model, cache):
    n_layers = model.cfg.n_layers
    rows = [cache["resid_pre", layer] for layer in range(n_layers)] + [
        cache["resid_post", n_layers - 1]]
    return F.layer_norm(torch.stack(rows), (model.cfg.d_model,), model.ln_final.w,
                        model.ln_final.b) @ model.W_U


def norm_shares_as_einsum(stack):
    total = stack.sum(dim=0)
    return torch.einsum("cbpm,bpm->cbp", stack, total) / total.norm(dim=-1) ** 2


def effective_rank_as_full_svd(matrix):
    S = torch.linalg.svd(matrix).S
    p = S[S > 1e-12] / S.sum()
    return torch.exp(-(p * p.log()).sum())


def composition_score_as_squares(written, read):
    product = torch.einsum("ij,jk->ik", written, read)
    return (product.pow(2).sum() / (written.pow(2).sum() * read.pow(2).sum())).sqrt()
