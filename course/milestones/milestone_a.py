"""Milestone A: the learner's functions of chapters 3 to 5, put together, are a transformer.

`make check` looks at one function at a time, with the library's around it. Here all of them run at
once in a model whose every weight matters, and must give its logits and its gradients.
"""

from dataclasses import dataclass, field

import torch

from config import ModelConfig, TrainConfig
from course.engine.expect import expect, expect_close, expect_equal, random, random_ids
from course.engine.milestones import Milestone, Together
from course.engine.models import busy_model
from losses import next_token_loss
from model import GPT
from train import fit

WANTED = {3: ("embed_text", "unembed_stream"),
          4: ("causal_mask", "project", "attend", "write"),
          5: ("layer_norm", "mlp_forward", "block_forward", "run_blocks", "gpt_forward",
              "count_parameters")}
SHAPES = (  # of the models, and of the texts [batch, pos] that they read
    ({"unembed_bias": True}, (3, 7)),
    ({"unembed_bias": True, "n_layers": 1, "n_heads": 1, "d_model": 5, "d_vocab": 7}, (2, 1)),
    ({"n_layers": 3, "n_heads": 3, "d_model": 12, "d_mlp": 20, "n_ctx": 11}, (1, 11)),
)


def embed_with(embed_text):
    """GPT.embed, made of the learner's embed_text."""
    return lambda model, tokens: embed_text(tokens, model.W_E, model.W_pos)


def unembed_with(unembed_stream):
    """GPT.unembed, made of the learner's unembed_stream; its LayerNorm is the learner's, too."""
    return lambda model, resid: unembed_stream(model.ln_final(resid), model.W_U, model.b_U)


PLACES = {"embed_text": ("model.GPT.embed", embed_with),
          "unembed_stream": ("model.GPT.unembed", unembed_with)}


@dataclass
class Case:
    """A model, tokens [batch, pos] for it, and what the library says: logits
    [batch, pos, d_vocab], and {name: gradient of the loss on the text}."""

    model: GPT
    tokens: torch.Tensor
    logits: torch.Tensor
    grads: dict


@dataclass
class Work:
    """The learner's functions together, and the cases on which they are tried."""

    together: Together
    cases: list = field(default_factory=list)


def gather(folder, given):
    """The Work: what the library says is computed before anything is put in its place."""
    work = Work(Together(folder, WANTED, PLACES))
    for changes, shape in SHAPES:
        model = busy_model(**changes)
        tokens = random_ids(model.cfg.d_vocab, *shape)
        logits = model(tokens)
        work.cases.append(Case(model, tokens, logits.detach(), gradients(model, tokens)))
    return work


def gradients(model, tokens):
    """{name: gradient} of a loss that reads all logits, by every weight."""
    model.zero_grad()
    logits = model(tokens)
    (logits * random(*logits.shape, seed=1)).sum().backward()
    return {name: None if weight.grad is None else weight.grad.clone()
            for name, weight in model.named_parameters()}


# Checks


def the_logits_are_the_library_s(work):
    """together they give the library's logits, in a model whose every weight matters"""
    compare_logits(work, work.cases[0])


def other_shapes_are_read_too(work):
    """so they do with one head or three, one layer or three, one token or a full context"""
    for case in work.cases[1:]:
        compare_logits(work, case)


def compare_logits(work, case):
    """Raises Wrong unless the learner's model gives the library's logits, twice."""
    shape = case.model.cfg
    what = (f"with {shape.n_layers} layers of {shape.n_heads} heads and {case.tokens.shape[1]} "
            "tokens, the logit")
    with work.together.in_place(), torch.no_grad():
        for time in (what, f"{what} at a second run"):
            expect_close(case.model(case.tokens), case.logits, time, "batch pos d_vocab")


def a_stream_that_goes_in_is_left_as_it_was(work):
    """the blocks leave the stream that they read as it was: a cache may hold it"""
    model = work.cases[0].model
    resid = random(2, 5, model.cfg.d_model)
    before = resid.clone()
    with work.together.in_place(), torch.no_grad():
        model.run_blocks(resid)
    expect_close(resid, before, "after the blocks, the stream that went in", "batch pos d_model",
                 ask="is there a += on it?")


def every_weight_learns(work):
    """every weight gets the gradient that the library's functions give it"""
    for case in work.cases:
        with work.together.in_place():
            found = gradients(case.model, case.tokens)
        for name, want in case.grads.items():
            expect(found[name] is not None,
                   f"no gradient reaches {name}: is there a detach, a .data or a no_grad on the "
                   "way?")
            expect_close(found[name], want, f"the gradient of {name}", tolerance=1e-3)


def it_learns_a_batch_by_heart(work):
    """a fresh model of them learns one batch by heart: below 0.1 nats in 80 steps"""
    model = GPT(ModelConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=12, d_vocab=9), seed=0)
    tokens = random_ids(9, 4, 12)
    tokens[:, 0] = torch.arange(4)  # no two rows begin alike, so that all of it can be known
    how = TrainConfig(max_steps=80, lr=0.02, muon_lr=0.05)
    with work.together.in_place():
        losses = [step.loss for step in fit(model, lambda: (tokens[:, :-1], tokens[:, 1:]), how)]
        with torch.no_grad():
            last = next_token_loss(model(tokens), tokens).item()
    expect(last < 0.1, f"it began at {losses[0]:.2f} nats and is at {last:.2f} after 80 steps")


def the_parameters_are_counted(work):
    """count_parameters counts a model of this library"""
    model = busy_model(tie_embeddings=True, n_layers=3, d_mlp=7)
    cfg = model.cfg
    count = work.together.function("count_parameters")
    found = count(cfg.n_layers, cfg.d_model, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx)
    expect_equal(found, model.n_parameters, "the number of parameters")


def blame(work, check):
    """Which of the functions is at fault."""
    return work.together.blame(check, work)


MILESTONE = Milestone(
    letter="A", title="a transformer of your own", chapter=5,
    hand_in="your functions of chapters 3 to 5, all in exercises/",
    gather=gather,
    checks=(the_logits_are_the_library_s, other_shapes_are_read_too,
            a_stream_that_goes_in_is_left_as_it_was, every_weight_learns,
            it_learns_a_batch_by_heart, the_parameters_are_counted),
    blame=blame)
