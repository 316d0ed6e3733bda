"""Dictionaries of a trained model's activations: what they keep and what they say.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/model.py, corpus.py
Next: experiments/dictionaries/transcoder.py
Source: Bricken et al. 2023; Gao et al. 2024 (loss recovered)
"""

from dataclasses import dataclass, field

import torch

from model import GPT


@dataclass(frozen=True)
class Subject:
    """A model whose activations at one hook point get a dictionary.

    at: the hook point, [batch, pos, d]. tokens: [batch, pos], to train the dictionary on; held_out:
    [batch, pos], to measure it on. variables: {name: [batch, pos], bool}, what is known of each
    position of held_out; empty where nothing is.
    """

    name: str
    model: GPT
    tokenizer: object
    at: str
    tokens: torch.Tensor
    held_out: torch.Tensor
    variables: dict = field(default_factory=dict)
