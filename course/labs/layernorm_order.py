"""Post-LayerNorm beside pre-LayerNorm: which of them trains in a deep model, and what stops it.

    python course/labs/layernorm_order.py            # 2 minutes, one thread
    python course/labs/layernorm_order.py --quick    # seconds: one seed, few steps

The library normalises what a part reads; the stream itself is a plain sum. The first transformers
normalised the sum. Here both are trained in the same way. Their weights are initialised so that a
matrix writes as much as it reads ("plain"), and not with GPT-2's small writes.

Claim: with 8 layers and no warm-up of the learning rate, pre-LN learns and post-LN does not. At the
start, post-LN's gradients are larger in the last layer, as Xiong et al. derive. But this is not
what stops it: with small writes they are about as large, and it learns. What the small writes do
reduce is how far one small step moves the predictions (Liu et al.). A warm-up of 60 steps is
reported and not claimed: it helped with four of the seeds 0 to 2 and 10 to 12, and not with two.
Control: with 2 layers, post-LN learns as well as pre-LN, and its first step moves no further.
Expected: every line passes. A seed takes 25 s (CPU, one core).

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: transformer_block.py, model.py
Next: pretrained.py
Source: Xiong et al. 2020, On layer normalization in the transformer architecture; Liu et al. 2020,
Understanding the difficulty of training transformers
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import nn

from config import DataConfig, ModelConfig, TrainConfig, option
from data import load_dataset, random_batch
from experiments.common import LabConfig, Trainings, mean_text, perform, seed_claim
from losses import cross_entropy, kl_divergence
from model import GPT
from plotting import PlainFigure, bare_axes, draw_lines
from train import fit, token_losses
from transformer_block import Block, NoNorm
from utils import run_program, seeded_generator

D_MODEL = 32  # a small stream, and so a small context and batch, keep 8 layers fast
N_CTX = 32


# What takes the place of the library's part


class PostBlock(Block):
    """A block in which each part reads the stream as it is, and the sum is normalised:

        resid = ln1(resid + attention(resid))
        resid = ln2(resid + mlp(resid))

    The library's `forward` calls the two methods, and adds what attention wrote in between.
    """

    def attention_inputs(self, resid):
        """What q, k and v read: the stream, [batch, pos, d_model]."""
        return [resid, resid, resid]

    def after_attention(self, resid):
        """The stream after this block, given the stream with attention's output already added."""
        resid = self.hook_resid_mid(self.ln1(resid))
        mlp_out = self.mlp(self.hook_mlp_in(resid))
        return self.hook_resid_post(self.ln2(resid + self.hook_mlp_out(mlp_out)))


@torch.no_grad()
def build_model(order, writes, cfg, seed):
    """A GPT with the initial weights of a seed. order: "pre" is the library's, "post" has
    PostBlocks. writes: "small" are GPT-2's, "plain" as large as what the other matrices give."""
    model = GPT(cfg, seed=None)
    if order == "post":
        model.blocks = nn.ModuleList(PostBlock(cfg) for _ in range(cfg.n_layers))
        model.ln_final = NoNorm()  # the last block's ln2 has already normalised the stream
    model.init_weights_(seeded_generator(seed))

    if writes == "plain":
        for block in model.blocks:
            block.attn.W_heads_out.mul_(math.sqrt(2 * cfg.n_layers))
            block.mlp.W_out.mul_(math.sqrt(2 * cfg.n_layers))
    return model


# What is measured


@dataclass(frozen=True)
class LayerNormConfig(LabConfig):
    """Settings of the lab."""

    depth: int = option(8, "layers of the deep models; the shallow ones have 2")
    lr: float = option(3e-3, "AdamW's highest learning rate")
    steps: int = option(160, "steps of training for each model")
    warmup_steps: int = option(60, "steps of the warm-up, where there is one")


def subjects_of(cfg):
    """{name: (order, writes, layers, steps of the warm-up)} of the models that are compared."""
    return {
        "pre": ("pre", "plain", cfg.depth, 0),
        "post": ("post", "plain", cfg.depth, 0),
        "post, small writes": ("post", "small", cfg.depth, 0),
        "post, warm-up": ("post", "plain", cfg.depth, cfg.warmup_steps),
        "pre, 2 layers": ("pre", "plain", 2, 0),
        "post, 2 layers": ("post", "plain", 2, 0),
    }


def gradients_by_layer(model, batch):
    """The norm of the loss's gradient in W_out of each block's MLP, a list."""
    inputs, targets = batch
    cross_entropy(model(inputs), targets).backward()
    return [block.mlp.W_out.grad.norm().item() for block in model.blocks]


def effect_of_a_step_(model, batch, how):
    """How far one step of AdamW moves the predictions: KL(before || after) in nats per word."""
    with torch.no_grad():
        before = model(batch[0])
    list(fit(model, lambda: batch, replace(how, max_steps=1, warmup_steps=0)))
    with torch.no_grad():
        return kl_divergence(before, model(batch[0])).mean().item()


def measure_model(subject, how, seed, dataset, trainings, label):
    """The measures of one model, before and after its training: a dict of plain values."""
    order, writes, n_layers, warmup_steps = subject
    shape = ModelConfig(n_layers=n_layers, d_model=D_MODEL, n_ctx=N_CTX,
                        d_vocab=dataset.tokenizer.d_vocab, init_scale=1 / math.sqrt(D_MODEL))

    # Before training: gradients, and one step of a tenth of the size
    batch = random_batch(dataset.train, 64, N_CTX, seeded_generator(seed))
    gradients = gradients_by_layer(build_model(order, writes, shape, seed), batch)
    small_step = replace(how, lr=how.lr / 10)
    effect = effect_of_a_step_(build_model(order, writes, shape, seed), batch, small_step)

    # Training
    generator = seeded_generator(seed)
    model = build_model(order, writes, shape, seed)
    losses = []
    trainings.begin(label)
    for step in fit(model, lambda: random_batch(dataset.train, how.batch_size, N_CTX, generator),
                    replace(how, warmup_steps=warmup_steps)):
        losses.append(step.loss)
        trainings.show(step.number, f"loss {step.loss:.2f}")
    trainings.close()
    trainings.count()

    unseen = torch.tensor(list(token_losses(model, dataset.val, starts=dataset.floor.starts)))
    return {"gradients": gradients, "effect": effect, "losses": losses,
            "excess": dataset.floor.above(unseen)["all"]}


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": {name: measures} of each seed}."""
    seeds = cfg.seeds[:1] if cfg.quick else cfg.seeds
    # Without clipping, which would steady a model, and with one optimiser for all weights
    how = TrainConfig(max_steps=4 if cfg.quick else cfg.steps, batch_size=16, optimizer="adamw",
                      lr=cfg.lr, grad_clip=0.0)
    dataset = load_dataset(DataConfig(dataset="builtin", tokenizer="word"), N_CTX)
    subjects = subjects_of(cfg)
    trainings = Trainings([how.max_steps] * len(seeds) * len(subjects))

    measured = [{name: measure_model(subject, how, seed, dataset, trainings, f"{name}, seed {seed}")
                 for name, subject in subjects.items()} for seed in seeds]
    return {"found": describe(measured), "claims": claims_of(measured, judged=not cfg.quick),
            "seeds": measured}


# What it shows


def claims_of(seeds, judged=True):
    """[Claim]. The thresholds were chosen on seeds 0 to 2 and judged on seeds 10 to 12."""

    def excess(name, other):
        return lambda seed: seed[name]["excess"] - seed[other]["excess"]

    def last_gradient(name, other):
        return lambda seed: seed[name]["gradients"][-1] / seed[other]["gradients"][-1]

    def effect(name, other):
        return lambda seed: seed[name]["effect"] / seed[other]["effect"]

    def beside(value):
        return f"2 layers: {mean_text(seeds, value('post, 2 layers', 'pre, 2 layers'))}"

    return [
        seed_claim("loss of post-LN − pre-LN, no warm-up (nats/word)", seeds,
                   excess("post", "pre"), above=1.0, judged=judged),
        seed_claim("… the control: with 2 layers", seeds,
                   excess("post, 2 layers", "pre, 2 layers"), below=0.2, judged=judged),
        seed_claim("loss of post-LN with small writes − pre-LN", seeds,
                   excess("post, small writes", "pre"), below=0.2, judged=judged),
        seed_claim("gradient in the last layer at the start, post-LN / pre-LN", seeds,
                   last_gradient("post", "pre"), above=1.5, judged=judged,
                   beside=beside(last_gradient)),
        seed_claim("… with small writes / with plain ones (no less: not what stops it)", seeds,
                   last_gradient("post, small writes", "post"), above=0.7, judged=judged),
        seed_claim("effect of a small first step, post-LN / pre-LN", seeds,
                   effect("post", "pre"), above=2.5, judged=judged, beside=beside(effect)),
        seed_claim("… with small writes / with plain ones", seeds,
                   effect("post, small writes", "post"), below=0.4, judged=judged),
        seed_claim("loss of post-LN with a warm-up − without (nats/word)", seeds,
                   excess("post, warm-up", "post")),
    ]


def describe(seeds):
    """The summary of all seeds' measures."""
    deep = {name: mean_text(seeds, lambda seed, name=name: seed[name]["excess"])
            for name in seeds[0]}
    return (f"Nats per word above the best possible, deep models: pre-LN {deep['pre']}, post-LN "
            f"{deep['post']}, with a warm-up {deep['post, warm-up']}, with small writes instead "
            f"{deep['post, small writes']}. With 2 layers: pre-LN {deep['pre, 2 layers']}, post-LN "
            f"{deep['post, 2 layers']}.")


def figures(result):
    """{name: Figure}: the training and the gradients at the start of the first seed's models."""
    deep = {name: one for name, one in result["seeds"][0].items() if "2 layers" not in name}
    losses = {name: (range(1, len(one["losses"]) + 1), one["losses"])
              for name, one in deep.items()}
    gradients = {name: (range(len(one["gradients"])), one["gradients"])
                 for name, one in deep.items() if name != "post, warm-up"}  # the same at the start

    figure = PlainFigure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_lines(bare_axes(left, "The deep models: which of them learn", "step",
                         "training loss (nats/word)"), losses, {})
    draw_lines(bare_axes(right, "At the start: gradients do not tell which will learn", "layer",
                         "norm of the gradient in W_out"), gradients, {})
    right.set_ylim(bottom=0)
    return {"layernorm_order": figure}


def main(argv=None):
    """Run the program: train, measure, print the table, write the figure."""
    perform(LayerNormConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)

# Extend it:
# - DeepNorm (Wang et al. 2022) multiplies the stream by (2 * n_layers) ** 0.25 before each sum, so
#   that a part counts for less beside it. Give PostBlock a `forward` that does. Does it learn?
# - A LayerNorm on both sides: let attention and the MLP read ln1(resid) and ln2(resid), and
#   normalise what they write with two more LayerNorms. Is the stream still a sum?
# - Find the depth at which post-LN stops learning: --depth 4, then 6. Does a smaller --lr move it?
#   How long must a warm-up be to help every seed? (--warmup_steps 150 --steps 400)
