"""Chapter 14 as a learner would write it: features that share dimensions, and dictionaries."""

import torch


def toy_forward(W, b, x):
    """A toy model: n features are compressed into fewer dimensions, and expanded again.

    W: [hidden, feature]; b: [feature]; x: [batch, feature]. Returns [batch, feature]: the ReLU of
    W^T W x + b.
    """
    hidden = x @ W.T  # [batch, hidden]
    return (hidden @ W + b).relu()


def dimensionality(W):
    """The share of a dimension that each feature has to itself.

    W: [hidden, feature], a column for each feature. D_i = |W_i|^2 / the sum over j of (w_i .
    W_j)^2, where w_i is W_i divided by its length, and 0 if W_i is 0. Returns [feature].
    """
    length = W.norm(dim=0)  # [feature]
    unit = W / length.clamp(min=1e-12)
    shared = (unit.T @ W).pow(2).sum(1)  # [feature]
    return length**2 / shared.clamp(min=1e-12)


def expected_feature_loss(W, b, importance, x):
    """The loss of a toy model: errors of important features count more.

    W, b, x as in toy_forward, which may be called; importance: [feature]. Returns a scalar: the
    mean over the batch of the sum over features of importance times the squared error.
    """
    error = toy_forward(W, b, x) - x
    return (importance * error.pow(2)).sum(1).mean()


def topk_latents(pre, k):
    """The code of a TopK dictionary: the k largest, and nothing below 0.

    pre: [batch, latent]. Returns the same shape: the k largest of each row if they are above 0, and
    0 elsewhere.
    """
    values, places = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


def dictionary_forward(x, W_enc, b_enc, W_dec, b_dec, k):
    """A TopK dictionary's code and reconstruction.

    x: [batch, d]; W_enc: [d, latent]; b_enc: [latent]; W_dec: [latent, d]; b_dec: [d], which is
    subtracted before the encoder and added after the decoder. topk_latents may be called. Returns
    (latents [batch, latent], reconstruction [batch, d]).
    """
    latents = topk_latents((x - b_dec) @ W_enc + b_enc, k)
    return latents, latents @ W_dec + b_dec


def explained_variance(x, reconstruction):
    """The share of the variance of x that a reconstruction explains.

    x, reconstruction: [batch, d]. Returns a scalar: 1 minus the squared error over the squared
    distance of x from its mean over the batch. 1 is perfect; always predicting the mean gives 0.
    """
    error = (x - reconstruction).pow(2).sum()
    spread = (x - x.mean(0)).pow(2).sum()
    return 1 - error / spread


def recovered_share(features, decoder, least=0.9):
    """How many of the true features a dictionary has found.

    features: [feature, d], the true directions; decoder: [latent, d], rows of any length. A feature
    is found if its cosine with its best latent is at least `least`. Returns a scalar, a share.
    """
    features = features / features.norm(dim=1, keepdim=True)
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    best = (features @ decoder.T).max(1).values  # [feature]
    return (best >= least).float().mean()
