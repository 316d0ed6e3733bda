"""Declare the benchmark's rows: each is a name, what can't be avoided, and what runs.

A row is made when its turn has come. What runs beside it (a forward pass, a plain loop, another
library) takes turns with it.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: logit_lens.py, patching.py, circuits.py, experiments/speed/floors.py
Next: experiments/speed/measure.py
Source: compared with Hugging Face's transformers and TransformerLens if they are installed; the
targets are this project's own
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import patching
from attribution import attribution_patching, direct_logit_attribution
from circuits import acdc, eap
from config import SamplingConfig
from experiments.speed.floors import (
    Work,
    acdc_work,
    decoding_work,
    dictionary_work,
    forward_work,
    gradient_work,
    path_matrix_work,
    sweep_work,
    training_work,
)
from experiments.speed.model import (
    ACDC_SHAPE,
    DEFAULT_SHAPE,
    GPT2_SMALL_SHAPE,
    LARGE_SHAPE,
    N_CELLS,
    NANOGPT_SHAPE,
    dictionary_step,
    hook_point_work,
    loop_over_cells,
    loop_over_paths,
    own_text,
    start_python,
    training_step,
    weight_products,
)
from experiments.speed.peers import (
    HUGGING_FACE,
    TRANSFORMER_LENS,
    hugging_face_decoding,
    hugging_face_model,
    hugging_face_step,
    installed,
    lens_sweep,
)
from generate import generate
from logit_lens import logit_lens
from metrics import Metric
from tokenizer import BPETokenizer, split_words

# Quantities of a row that targets name
TIME = "time over floor"
BEYOND = "seconds over floor"
PEAK = "GB at the peak"


@dataclass(frozen=True)
class Row:
    """One thing that is timed.

    run: does it once. floor: the Work that it can't avoid, or a function that is timed as the
    floor; None if there is none.
    targets: {quantity: the threshold, as `claim` takes it}, the most important first; a row without
    is only information. Quantities: "time over floor", "seconds over floor", "seconds", "UNIT a
    second", "GB at the peak", "time over X" for each X of `over`, "times as fast as X" for each of
    `peers`.
    over, peers: {X: a function}, timed in turn with it; a peer does the same work, or `peer_share`
    of it. amount: (number, unit) of what one run makes.
    is_short: whether it is one of the ten rows that the program prints. of_gradients: whether it
    needs autograd.
    """

    name: str
    run: Callable
    floor: Work | Callable | None
    targets: dict = field(default_factory=dict)
    over: dict = field(default_factory=dict)
    peers: dict = field(default_factory=dict)
    peer_share: float = 1.0
    amount: tuple | None = None
    is_short: bool = False
    of_gradients: bool = False


def training_rows(setting, peers):
    """Training steps, several in a row, as in training: what runs beside them would empty the
    processor's memory after each. Only the model's own products are the floor: an optimiser's are
    not."""
    for name, shape, batch, optimizer, n_steps, most in (
            ("nanoGPT's CPU shape, AdamW", NANOGPT_SHAPE, 12, "adamw", 10, 1.39),
            ("the default shape, Muon", DEFAULT_SHAPE, 12, "muon", 10, 1.61),
            ("6 layers of 384, context 256, Muon", LARGE_SHAPE, 4, "muon", 1, None)):
        cfg = setting.shape(shape)
        others = {}
        if shape is NANOGPT_SHAPE and installed("transformers"):
            other = hugging_face_model(cfg).to(setting.device)
            tokens = setting.tokens(cfg, batch, cfg.n_ctx + 1)
            others[HUGGING_FACE] = repeat(hugging_face_step(other, tokens, setting.dtype), n_steps)
        yield Row(
            f"training, {name}, batch {batch}, {n_steps} step{'s' if n_steps > 1 else ''}",
            repeat(training_step(setting, cfg, batch, optimizer), n_steps),
            training_work(cfg, batch, n_steps),
            targets={TIME: {"below": most}} if most else {}, peers=others,
            amount=(n_steps * batch * cfg.n_ctx, "tokens"), is_short=shape is NANOGPT_SHAPE,
            of_gradients=True)


def repeat(run, times):
    """A function that runs another one several times."""
    def run_all():
        for _ in range(times):
            run()

    return run_all


def dictionary_rows(setting, peers):
    """Training steps of dictionaries (sparse autoencoders)."""
    batch, d_model, n_latents = (32, 16, 64) if setting.quick else (1024, 256, 2048)
    for kind, sparsity in (("ReLU + L1", 0.1), ("TopK", min(32, d_model))):
        yield Row(
            f"training a dictionary, {kind}, {n_latents} latents of {d_model}, batch {batch}",
            dictionary_step(kind, sparsity, batch=batch, d_model=d_model, n_latents=n_latents),
            dictionary_work(batch, d_model, n_latents), targets={TIME: {"below": 1.67}})


def forward_rows(setting, peers):
    """Forward passes, hook points without listeners, and forward passes that cache everything."""
    model = setting.gpt2_small
    forward = setting.compiled(model)
    others = {HUGGING_FACE: peers.hugging_face, TRANSFORMER_LENS: peers.transformer_lens}

    for batch in (8, 1):
        tokens = setting.tokens(model.cfg, batch, 64)
        work = forward_work(model.cfg, batch, 64)
        passes = {name: lambda other=other, tokens=tokens: other(tokens)
                  for name, other in others.items() if other is not None}
        products = {"bare products": weight_products(model, tokens)}
        yield Row(f"forward, {batch} x 64", lambda tokens=tokens: forward(tokens), work,
                  targets={TIME: {"below": 1.05}}, over=products, peers=passes,
                  is_short=batch == 8)

        plain = {"forward": lambda tokens=tokens: model(tokens)}
        yield Row(f"hook points without listeners, {batch} x 64", hook_point_work(model, tokens),
                  None, targets={"time over forward": {"below": 0.01}}, over=plain)

        caching = {}
        if peers.transformer_lens is not None:
            caching[TRANSFORMER_LENS] = (
                lambda tokens=tokens: peers.transformer_lens.run_with_cache(tokens))
        yield Row(f"caching everything, {batch} x 64",
                  lambda tokens=tokens: model.run_with_cache(tokens), work,
                  targets={"time over forward": {"below": 1.03}}, over=plain, peers=caching,
                  is_short=batch == 8)


def two_prompts(setting, cfg, batch=1, pos=16):
    """Clean and corrupted tokens, each [batch, pos], and a metric at the last position."""
    clean_tokens = setting.tokens(cfg, batch, pos)
    corrupted_tokens = setting.tokens(cfg, batch, pos, seed=1)
    return clean_tokens, corrupted_tokens, Metric.logit_diff(5, 7)


def sweep_rows(setting, peers):
    """Patching sweeps between two prompts of 16 random tokens.

    The whole sweep is timed. The plain loop, and TransformerLens's, which is the same, take a full
    forward pass for each cell, so only N_CELLS of their cells are timed.
    """
    model = setting.gpt2_small
    cfg = model.cfg
    clean_tokens, corrupted_tokens, metric = two_prompts(setting, cfg)
    _, clean_cache = model.run_with_cache(clean_tokens)

    for name, sweep, activation, setter, axes in (
            ("resid_pre by position", patching.get_act_patch_resid_pre, "resid_pre",
             "layer_pos_patch_setter", ("layer", "pos")),
            ("heads", patching.get_act_patch_attn_head_out_all_pos, "z",
             "layer_head_vector_patch_setter", ("layer", "head")),
            ("heads by position", patching.get_act_patch_attn_head_out_by_pos, "z",
             "layer_pos_head_vector_patch_setter", ("layer", "pos", "head"))):
        sizes = {"layer": cfg.n_layers, "pos": 16, "head": cfg.n_heads}
        n_cells = torch.tensor([sizes[axis] for axis in axes]).prod().item()
        others = {"our plain loop": loop_over_cells(model, corrupted_tokens, clean_cache, metric,
                                                    activation)}
        if peers.transformer_lens is not None:
            others[TRANSFORMER_LENS] = lens_sweep(
                peers.transformer_lens, corrupted_tokens, clean_tokens, activation=activation,
                setter=setter, axes=axes)
        yield Row(
            f"sweep of {name}, 1 x 16, {n_cells:,} cells",
            lambda sweep=sweep: sweep(model, corrupted_tokens, clean_cache, metric),
            sweep_work(cfg, 16, of_heads="head" in axes, by_pos="pos" in axes),
            targets={TIME: {"below": 1.25}}, peers=others, peer_share=N_CELLS / n_cells,
            amount=(n_cells, "cells"), is_short=True)


def gradient_rows(setting, peers):
    """What one gradient estimates: all nodes, and all edges; and all edges, one at a time."""
    model = setting.gpt2_small
    cfg = model.cfg
    clean_tokens, corrupted_tokens, metric = two_prompts(setting, cfg)
    _, clean_cache = model.run_with_cache(clean_tokens)
    forward = {"forward": torch.no_grad()(lambda: model(clean_tokens))}
    names = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")
    yield Row(
        "attribution patching of all nodes, 1 x 16",
        lambda: attribution_patching(model, corrupted_tokens, clean_cache, metric, names=names,
                                     axes=("layer", "pos", "head")),
        gradient_work(cfg, 16), targets={"time over forward": {"below": 2.1}}, over=forward,
        is_short=True, of_gradients=True)
    yield Row(
        "EAP of all edges, 1 x 16", lambda: eap(model, clean_tokens, corrupted_tokens, metric),
        gradient_work(cfg, 16, n_runs=2),
        targets={"time over forward": {"below": 4}, PEAK: {"below": 3}},
        over=forward, of_gradients=True)

    small = setting.model(ACDC_SHAPE)
    prompts = two_prompts(setting, small.cfg, batch=16)
    circuit = acdc(small, *prompts, threshold=1e-3)
    yield Row(
        f"ACDC, 2 layers of 128, {small.cfg.n_heads} heads, 16 x 16",
        lambda: acdc(small, *prompts, threshold=1e-3), acdc_work(small.cfg, 16, 16, circuit),
        targets={"seconds": {"below": 10}}, amount=(int(circuit.exists.sum()), "edges"))


def path_rows(setting, peers):
    """Path patching from every head to every later head's values."""
    model = setting.model(GPT2_SMALL_SHAPE | {"n_layers": 4})
    cfg = model.cfg
    prompts = two_prompts(setting, cfg)
    n_paths = cfg.n_layers * (cfg.n_layers - 1) // 2 * cfg.n_heads**2
    loop = "the loop of path_patch"
    yield Row(
        f"matrix of paths, {cfg.n_layers} layers of {cfg.d_model}, 1 x 16, {n_paths} paths",
        lambda: patching.path_patch_matrix(model, *prompts), path_matrix_work(cfg, 16),
        targets={f"times as fast as {loop}": {"above": 5}},
        peers={loop: loop_over_paths(model, *prompts)}, peer_share=N_CELLS / n_paths,
        amount=(n_paths, "paths"), is_short=True)


def decoding_rows(setting, peers):
    """Decoding at GPT-2 small's shape, one token at a time."""
    model = setting.gpt2_small
    n_prompt, n_new = (8, 16) if setting.quick else (32, 64)
    tokens = setting.tokens(model.cfg, 1, n_prompt)
    sampling = SamplingConfig(max_new_tokens=n_new, greedy=True)
    others = {}
    if peers.hugging_face is not None:
        others[HUGGING_FACE] = hugging_face_decoding(peers.hugging_face, tokens, n_new)
    yield Row(
        f"decoding, {n_prompt} tokens of prompt and {n_new} new ones",
        lambda: list(generate(model, tokens, sampling)), decoding_work(model.cfg, n_new),
        targets={TIME: {"below": 1.33}}, peers=others, amount=(n_new, "tokens"), is_short=True)


def reading_rows(setting, peers):
    """Analyses of one prompt of 64 tokens at GPT-2 small's shape."""
    model = setting.gpt2_small
    tokens = setting.tokens(model.cfg, 1, 64)
    _, cache = model.run_with_cache(tokens)
    forward = {"forward": lambda: model(tokens)}
    n_lenses = model.cfg.n_layers + 1
    yield Row(
        "the lens at one position, 1 x 64", lambda: logit_lens(model, cache, pos=-1, top_k=5),
        Work(n_lenses * model.W_U.numel(), model.W_U.numel()),
        targets={"time over forward": {"below": 2}}, over=forward)
    n_neurons = model.cfg.n_layers * model.cfg.d_mlp
    yield Row(
        "direct attribution to every neuron, 1 x 64",
        lambda: direct_logit_attribution(model, cache, 0, unit="neuron"),
        Work(n_neurons * model.cfg.d_model, n_neurons * model.cfg.d_model),
        targets={PEAK: {"below": 1}}, over=forward, amount=(n_neurons, "neurons"))


def text_rows(setting, peers):
    """The start of the program, and the tokenizer."""
    logits = ("import torch; from config import ModelConfig; from model import GPT; "
              "GPT(ModelConfig(d_vocab=65))(torch.zeros(1, 8, dtype=torch.long))")
    yield Row(
        "start of Python to the first logits", lambda: start_python(logits, setting.threads),
        lambda: start_python("import torch", setting.threads), targets={BEYOND: {"below": 0.15}},
        is_short=True)

    text = own_text()[:20_000 if setting.quick else None]
    tokenizer = BPETokenizer().train(text, 300 if setting.quick else 1024)

    def encode_cold():
        tokenizer.known_words.clear()
        tokenizer.encode(text)

    yield Row(
        "BPE, no word known before", encode_cold, lambda: list(split_words(text)),
        targets={"MB a second": {"above": 3}}, amount=(len(text.encode()) / 1e6, "MB"))


GROUPS = {"training": training_rows, "forward": forward_rows, "sweeps": sweep_rows,
          "gradients": gradient_rows, "paths": path_rows, "decoding": decoding_rows,
          "reading": reading_rows, "dictionaries": dictionary_rows, "text": text_rows}
CPU_GROUPS = ("dictionaries", "text")  # what no GPU computes
