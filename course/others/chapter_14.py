"""Other right solutions of the exercises of chapter 14."""

import torch
import torch.nn.functional as F


def toy_forward_as_one_matrix(W, b, x):
    return torch.clamp(x @ (W.T @ W) + b, min=0)


def dimensionality_as_loop(W):
    values = []
    for i in range(W.shape[1]):
        length = W[:, i].norm()
        if length == 0:
            values.append(torch.tensor(0.0))
            continue
        shared = sum((W[:, i] @ W[:, j] / length) ** 2 for j in range(W.shape[1]))
        values.append(length**2 / shared)
    return torch.stack(values)


def expected_feature_loss_as_einsum(W, b, importance, x):
    out = F.relu(torch.einsum("hi,hj,bj->bi", W, W, x) + b)
    return torch.einsum("bi,i->b", (x - out) ** 2, importance).mean()


def topk_latents_as_threshold(pre, k):
    least = pre.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where((pre >= least) & (pre > 0), pre, torch.zeros_like(pre))


def topk_latents_as_loop(pre, k):
    out = torch.zeros_like(pre)
    for row in range(len(pre)):
        for place in pre[row].argsort(descending=True)[:k]:
            out[row, place] = max(pre[row, place], 0)
    return out


def dictionary_forward_as_steps(x, W_enc, b_enc, W_dec, b_dec, k):
    centred = x - b_dec
    pre = torch.addmm(b_enc, centred, W_enc)
    latents = topk_latents_as_threshold(pre, k)
    return latents, b_dec + torch.einsum("bl,ld->bd", latents, W_dec)


def explained_variance_as_var(x, reconstruction):
    residual = (x - reconstruction).pow(2).mean(0).sum()
    return 1 - residual / x.var(0, correction=0).sum()


def recovered_share_as_cosine(features, decoder, least=0.9):
    cosines = F.cosine_similarity(features[:, None], decoder[None], dim=-1)
    return sum(float(row.max() >= least) for row in cosines) / len(features)
