"""A small model in which every weight matters, and a metric, for the checks of several chapters."""

import torch

from config import ModelConfig
from course.engine.expect import random
from model import GPT


def busy_model(**changes):
    """A GPT of 9 tokens whose weights are all large and random, LayerNorms and biases too."""
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 6, "n_ctx": 8, "d_vocab": 9}
    model = GPT(ModelConfig(**shape | changes))
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.copy_(0.5 * random(*weight.shape, seed=seed) + (weight.ndim == 1))
    return model.eval()


def cache_of(model, tokens):
    """The cache of one run."""
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def answer(logits):
    """A metric: the logit of token 3 less that of token 5, at the last position, [batch]."""
    return logits[:, -1, 3] - logits[:, -1, 5]
