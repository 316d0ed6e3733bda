"""Time the groups of the benchmark: each function times one group and returns its claims.

All contestants of a group take turns, and a ratio is taken within each round. So a claim has one
value per round, and their median is judged.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: logit_lens.py, patching.py, experiments/speed/model.py
Next: experiments/speed/report.py
Source: compared with Hugging Face's transformers and TransformerLens if they are installed; the
thresholds are this project's own
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import patching
from attribution import attribution_patching, direct_logit_attribution
from config import ModelConfig, SamplingConfig
from experiments.common import claim, take_turns
from experiments.speed.model import (
    DEFAULT_SHAPE,
    GPT2_SMALL_SHAPE,
    LARGE_SHAPE,
    N_CELLS,
    NANOGPT_SHAPE,
    TINY_SHAPE,
    dictionary_recipes,
    dictionary_step,
    experiment_trainings,
    hook_point_work,
    hugging_face_model,
    hugging_face_step,
    installed,
    lens_bridge,
    lens_sweep,
    loop_over_cells,
    our_step,
    random_tokens,
    weight_products,
)
from generate import generate
from logit_lens import logit_lens
from metrics import Metric
from model import GPT
from utils import seeded_generator

ROOT = Path(__file__).resolve().parent.parent.parent

median_claim = functools.partial(claim, median=True)


@dataclass(frozen=True)
class TimedSweep:
    """A timed sweep of `patching.py`.

    activation: the patched activation. lens_setter: TransformerLens's function that patches it.
    axes: the axes of the sweep. mark: how many times as fast as TransformerLens it must be.
    """

    run: Callable
    activation: str
    lens_setter: str
    axes: tuple
    mark: float


SWEEPS = {
    "resid_pre, by position": TimedSweep(
        patching.get_act_patch_resid_pre, activation="resid_pre",
        lens_setter="layer_pos_patch_setter", axes=("layer", "pos"), mark=13),
    "heads": TimedSweep(
        patching.get_act_patch_attn_head_out_all_pos, activation="z",
        lens_setter="layer_head_vector_patch_setter", axes=("layer", "head"), mark=8),
    "heads, by position": TimedSweep(
        patching.get_act_patch_attn_head_out_by_pos, activation="z",
        lens_setter="layer_pos_head_vector_patch_setter", axes=("layer", "pos", "head"), mark=13),
}


def matmul_flops(cfg, batch):
    """The operations in the matrix products of a forward pass at full context: two for each weight
    and token, plus the two products of attention over the whole square."""
    d_heads = cfg.n_heads * cfg.d_head
    weights = cfg.n_layers * (4 * cfg.d_model * d_heads + 2 * cfg.d_model * cfg.d_mlp)
    weights += cfg.d_model * cfg.d_vocab_out
    attention = cfg.n_layers * 2 * cfg.n_ctx * d_heads
    return 2 * batch * cfg.n_ctx * (weights + attention)


def small_config(cfg):
    """The ModelConfig of GPT-2 small's shape; tiny in a quick run."""
    return ModelConfig(**TINY_SHAPE if cfg.quick else GPT2_SMALL_SHAPE)


def training_claims(cfg):
    """Time training steps (with fused attention, as without listeners): tokens per second, and the
    share of the rate at which 1024 x 1024 matrices are multiplied."""
    size = 128 if cfg.quick else 1024
    left, right = torch.randn(2, size, size, generator=seeded_generator(0))
    groups = [("nanoGPT's CPU shape, AdamW", NANOGPT_SHAPE, 12, "adamw"),
              ("the default shape, Muon", DEFAULT_SHAPE, 12, "muon"),
              ("6 layers of 384, context 256, Muon", LARGE_SHAPE, 4, "muon")]
    claims = []
    for name, shape, batch, optimizer in groups:
        has_mark = shape is NANOGPT_SHAPE
        model_cfg = ModelConfig(**TINY_SHAPE if cfg.quick else shape)

        contestants = {"product": lambda: left @ right,
                       name: our_step(model_cfg, batch, optimizer)}
        against_others = has_mark and installed("transformers")
        if against_others:
            contestants["Hugging Face"] = hugging_face_step(model_cfg, batch)
        seconds = take_turns(contestants, cfg.rounds)

        # one product forward, two backward
        products_in_a_step = 3 * matmul_flops(model_cfg, batch) / (2 * size**3)
        ideal = products_in_a_step * seconds["product"]
        claims.append(median_claim(
            f"training, {name}, batch {batch}: share of the matmul rate", ideal / seconds[name],
            above=0.66 if has_mark else None, judged=not cfg.quick))
        claims.append(median_claim(
            f"training, {name}, batch {batch}: tokens a second",
            batch * model_cfg.n_ctx / seconds[name]))
        if against_others:
            claims.append(median_claim(
                f"training, {name}: times as fast as Hugging Face's",
                seconds["Hugging Face"] / seconds[name], above=1.2, judged=not cfg.quick))
    return claims


def dictionary_claims(cfg):
    """Time training steps of dictionaries: the share of the rate at which 1024 x 1024 matrices are
    multiplied, for the five products of a step (two forward, three backward)."""
    size = 128 if cfg.quick else 1024
    left, right = torch.randn(2, size, size, generator=seeded_generator(0))
    claims = []
    for kind, (recipe, d_model) in dictionary_recipes(cfg.quick).items():
        seconds = take_turns({"product": lambda: left @ right,
                              "dictionary": dictionary_step(recipe, d_model)}, cfg.rounds)
        products_in_a_step = 5 * recipe.batch * d_model * recipe.n_latents / size**3
        claims.append(median_claim(
            f"training a dictionary, {kind}, {recipe.n_latents} latents of {d_model}, batch "
            f"{recipe.batch}: share of the matmul rate",
            products_in_a_step * seconds["product"] / seconds["dictionary"], above=0.6,
            judged=not cfg.quick))
    return claims


@torch.no_grad()
def forward_claims(cfg):
    """Time forward passes and full caching at GPT-2 small's shape."""
    model = GPT(small_config(cfg))
    others = {}
    if installed("transformers"):
        others["Hugging Face"] = hugging_face_model(model.cfg).eval()
    if installed("transformer_lens") and not cfg.quick:
        with tempfile.TemporaryDirectory() as folder:
            others["TransformerLens"] = lens_bridge(model, Path(folder))
        others["TransformerLens, caching"] = others["TransformerLens"].run_with_cache

    claims = []
    for batch in (1, 8):
        tokens = random_tokens(model.cfg, batch, 64)
        contestants = {
            "forward": lambda tokens=tokens: model(tokens),
            "weight products": weight_products(model, tokens),
            "hook points": hook_point_work(model, tokens),
            "caching": lambda tokens=tokens: model.run_with_cache(tokens),
        }
        for name, run in others.items():
            contestants[name] = lambda run=run, tokens=tokens: run(tokens)
        rounds = cfg.rounds * (3 if batch == 1 and not cfg.quick else 1)
        seconds = take_turns(contestants, rounds)

        size = f"{batch} x 64"
        claims += [
            median_claim(f"{size}: time of forward over weight products",
                         seconds["forward"] / seconds["weight products"],
                         below=1.10, judged=not cfg.quick),
            median_claim(f"{size}: what hook points do while nobody listens, timed alone, over "
                         "forward", seconds["hook points"] / seconds["forward"],
                         below=0.01, judged=not cfg.quick),
            median_claim(f"{size}: time of caching over forward",
                         seconds["caching"] / seconds["forward"],
                         below=1.05, judged=not cfg.quick),
        ]
        for name in others:
            own = "caching" if "caching" in name else "forward"
            claims.append(median_claim(f"{size}: time of {name} over our {own}",
                                       seconds[name] / seconds[own]))
    return claims


@torch.no_grad()
def decoding_claims(cfg):
    """Time decoding at GPT-2 small's shape; a token takes at least the time to read all weights."""
    model = GPT(small_config(cfg)).eval()
    n_prompt, n_new = (8, 16) if cfg.quick else (32, 128)
    tokens = random_tokens(model.cfg, 1, n_prompt)
    sampling = SamplingConfig(max_new_tokens=n_new, greedy=True)
    contestants = {
        "reading the weights": lambda: [weight.sum() for weight in model.parameters()],
        "decoding": lambda: list(generate(model, tokens, sampling)),
    }
    if installed("transformers"):
        other = hugging_face_model(model.cfg).eval()
        other.load_state_dict(model.to_hf_state_dict())
        limits = {"max_new_tokens": n_new, "min_new_tokens": n_new, "use_cache": True}
        contestants["Hugging Face"] = lambda: other.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **limits)
    seconds = take_turns(contestants, min(cfg.rounds, 5))

    name = f"decoding, {n_prompt} tokens of prompt and {n_new} new ones"
    claims = [
        median_claim(f"{name}: tokens a second", n_new / seconds["decoding"]),
        median_claim(f"{name}: share of the rate at which the weights can be read",
                     n_new * seconds["reading the weights"] / seconds["decoding"]),
    ]
    if "Hugging Face" in contestants:
        claims.append(median_claim(f"{name}: times as fast as Hugging Face's generate",
                                   seconds["Hugging Face"] / seconds["decoding"],
                                   above=1.0, judged=not cfg.quick))
    return claims


@torch.no_grad()
def reading_claims(cfg):
    """Time analyses of one prompt of 64 tokens at GPT-2 small's shape."""
    import resource  # not on every system
    model = GPT(small_config(cfg)).eval()
    tokens = random_tokens(model.cfg, 1, 64)
    half = (model.cfg.n_layers + 1) // 2
    _, cache = model.run_with_cache(tokens)
    contestants = {
        "forward": lambda: model(tokens),
        "half of the blocks": lambda: model.run_blocks(model.embed(tokens), stop=half),
        "the lens at one position": lambda: logit_lens(model, cache, pos=-1, top_k=5),
        "every neuron": lambda: direct_logit_attribution(model, cache, 0, unit="neuron"),
    }

    # memory, before anything else raises its peak; ru_maxrss is in kB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contestants["every neuron"]()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    claims = [median_claim("reading 1 x 64: GB that every neuron's attribution adds to the peak",
                           added, below=1.0, judged=not cfg.quick)]

    # time
    seconds = take_turns(contestants, cfg.rounds)
    for name in list(contestants)[1:]:
        has_mark = "lens" in name
        claims.append(median_claim(
            f"reading 1 x 64: time of {name} over forward", seconds[name] / seconds["forward"],
            below=2.0 if has_mark else None, judged=not cfg.quick))

    # how much smaller a filtered cache is
    for name, filters in (("the streams", {"names_filter": lambda n: "resid_post" in n}),
                          ("one position", {"pos_slice": -1})):
        _, part = model.run_with_cache(tokens, **filters)
        claims.append(median_claim(f"reading 1 x 64: share of a full cache, {name}",
                                   part.nbytes / cache.nbytes))
    return claims


@torch.no_grad()
def patching_claims(cfg):
    """Time sweeps between two prompts of 16 random tokens, and attribution to all activations.

    The whole sweep is timed. The plain loop, and TransformerLens's, which is the same, take a full
    forward pass for each cell, so only N_CELLS of their cells are timed.
    """
    model = GPT(small_config(cfg)).eval()
    clean_tokens, corrupted_tokens = random_tokens(model.cfg, 2, 16)[:, None]
    metric = Metric.logit_diff(5, 7)
    target = torch.zeros(model.cfg.d_vocab)
    target[5] = 1
    target[7] = -1
    _, clean_cache = model.run_with_cache(clean_tokens)
    bridge = None
    if installed("transformer_lens") and not cfg.quick:
        with tempfile.TemporaryDirectory() as folder:
            bridge = lens_bridge(model, Path(folder))

    claims = []
    for name, sweep in SWEEPS.items():
        contestants = {
            "sweep": lambda sweep=sweep: sweep.run(model, corrupted_tokens, clean_cache, metric),
            "our own loop": loop_over_cells(model, corrupted_tokens, clean_cache, metric=metric,
                                            activation=sweep.activation),
        }
        if bridge is not None:
            contestants["TransformerLens"] = lens_sweep(
                bridge, corrupted_tokens, clean_tokens, activation=sweep.activation,
                setter=sweep.lens_setter, axes=sweep.axes, target=target)
        n_cells = contestants["sweep"]().values.numel()
        seconds = take_turns(contestants, min(cfg.rounds, 3 if n_cells > 1000 else 5))
        for other in list(contestants)[1:]:
            claims.append(median_claim(
                f"patching 1 x 16, {name}, {n_cells:,} cells: times as fast as {other}",
                seconds[other] / N_CELLS * n_cells / seconds["sweep"],
                above=sweep.mark if other == "TransformerLens" else None))

    names = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")
    seconds = take_turns({
        "forward": lambda: model(corrupted_tokens),
        "attribution": lambda: attribution_patching(
            model, corrupted_tokens, clean_cache, metric, names=names,
            axes=("layer", "pos", "head")),
    }, cfg.rounds)
    claims.append(median_claim("attribution patching of all nodes, 1 x 16: time over forward",
                               seconds["attribution"] / seconds["forward"],
                               below=3.0, judged=not cfg.quick))
    return claims


def start_claims(cfg):
    """Time the start of Python up to the first logits, beyond the start of Python and torch."""
    logits = ("import torch; from config import ModelConfig; from model import GPT; "
              "GPT(ModelConfig(d_vocab=65))(torch.zeros(1, 8, dtype=torch.long))")

    def start(code):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    seconds = take_turns({"first logits": lambda: start(logits),
                          "import torch": lambda: start("import torch")}, cfg.rounds)
    later = seconds["first logits"] - seconds["import torch"]
    return [median_claim("seconds from torch imported to the first logits", later,
                         below=0.3, judged=not cfg.quick)]


def experiment_claims(cfg):
    """Time one training of each kind of experiment."""
    claims = []
    for name, (train, most) in experiment_trainings(cfg.quick).items():
        began = time.perf_counter()
        train()
        seconds = time.perf_counter() - began
        claims.append(median_claim(f"training {name}: seconds", seconds, below=most,
                                   judged=not cfg.quick))
    return claims
