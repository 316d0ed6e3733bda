"""What it costs to read a run and to intervene in one: a part of experiments/benchmark.py.

At GPT-2 small's shape. A sweep is timed whole; the loop that it replaces, and TransformerLens's,
which is that loop, on a few of its cells, since each of them takes one full forward pass.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Read before: patching.py, logit_lens.py; after: experiments/benchmark.py
Source: compared with TransformerLens (Nanda & Bloom 2022) where it is installed
"""

import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

import torch

import patching
from attribution import attribution_patching, direct_logit_attribution
from config import PRESETS, ModelConfig
from experiments.common import claim_of, take_turns
from logit_lens import logit_lens
from metrics import Metric
from model import GPT
from tokenizer import BPETokenizer
from utils import seeded_generator

GPT2_SMALL = PRESETS["gpt2"] | {"d_vocab": 50257}
QUICK = {"n_layers": 1, "n_heads": 2, "d_model": 16, "n_ctx": 64, "d_vocab": 65}
CELLS = 8  # of a sweep that the loop runs
SWEEPS = {  # name: (function, activation, its setter in TransformerLens, axes, mark)
    "resid_pre, by position": (patching.get_act_patch_resid_pre, "resid_pre",
                               "layer_pos_patch_setter", ("layer", "pos"), 13),
    "heads": (patching.get_act_patch_attn_head_out_all_pos, "z",
              "layer_head_vector_patch_setter", ("layer", "head"), 8),
    "heads, by position": (patching.get_act_patch_attn_head_out_by_pos, "z",
                           "layer_pos_head_vector_patch_setter", ("layer", "pos", "head"), 13),
}


def random_tokens(cfg, batch, pos):
    """[batch, pos] of ids, the same ones each time."""
    return torch.randint(cfg.d_vocab, (batch, pos), generator=seeded_generator(0))


def installed(package):
    """Whether a package that is never required happens to be there."""
    return importlib.util.find_spec(package) is not None


@torch.no_grad()
def reading_claims(cfg):
    """What it costs to read a run at GPT-2 small's shape: one prompt of 64 tokens."""
    import resource  # not on every system
    model = GPT(ModelConfig(**QUICK if cfg.quick else GPT2_SMALL)).eval()
    tokens, half = random_tokens(model.cfg, 1, 64), (model.cfg.n_layers + 1) // 2
    _, cache = model.run_with_cache(tokens)
    contestants = {
        "forward": lambda: model(tokens),
        "half of the blocks": lambda: model.run_blocks(model.embed(tokens), stop=half),
        "the lens at one position": lambda: logit_lens(model, cache, positions=-1, top_k=5),
        "every neuron": lambda: direct_logit_attribution(model, cache, 0, unit="neuron"),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contestants["every neuron"]()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    claims = [claim_of("reading 1 x 64: GB that every neuron's attribution adds to the peak",
                       torch.tensor([added]), at_most=None if cfg.quick else 1.0)]
    seconds = take_turns(contestants, cfg.rounds)
    for name in list(contestants)[1:]:
        most = 2.0 if "lens" in name and not cfg.quick else None
        claims.append(claim_of(f"reading 1 x 64: time of {name} over forward",
                               seconds[name] / seconds["forward"], at_most=most))
    for name, filters in (("the streams", {"names_filter": lambda n: "resid_post" in n}),
                          ("one position", {"pos_slice": -1})):
        share = torch.tensor([model.run_with_cache(tokens, **filters)[1].nbytes / cache.nbytes])
        claims.append(claim_of(f"reading 1 x 64: share of a full cache, {name}", share))
    return claims


def loop_over_cells(model, tokens, source, *, metric, activation):
    """A function that runs CELLS cells by the plain loop: one whole forward pass each."""
    def put(own, hook):
        return source[hook.name]

    names = [f"blocks.{layer}.{'attn.' * (activation == 'z')}hook_{activation}"
             for layer in range(model.cfg.n_layers)]
    return lambda: [metric(model.run_with_hooks(tokens, [(names[cell % len(names)], put)]))
                    for cell in range(CELLS)]


def lens_bridge(model, folder):
    """TransformerLens's model with the same weights, which it reads from a folder in Hugging Face's
    layout."""
    library = importlib.import_module("transformer_lens")
    model.save_pretrained(folder)
    pieces = BPETokenizer().state_dict()["tokens"]
    vocab = {token: number for number, token in enumerate([*pieces, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"} | special))
    return library.TransformerBridge.boot_transformers(str(folder))


def lens_sweep(bridge, tokens, clean, *, sweep, target):
    """A function that runs CELLS cells of TransformerLens's own sweep; target: two token ids."""
    library = importlib.import_module("transformer_lens.patching")
    library.tqdm = lambda rows: rows  # its progress bar
    _, activation, setter, axes, _ = sweep
    cells = importlib.import_module("pandas").DataFrame(
        [[cell % bridge.cfg.n_layers, *[cell % 4] * (len(axes) - 1)] for cell in range(CELLS)],
        columns=axes)
    _, cache = bridge.run_with_cache(clean)
    return lambda: library.generic_activation_patch(
        bridge, tokens, cache, lambda logits: (logits[:, -1] @ target).mean(),
        getattr(library, setter), activation, index_df=cells)


@torch.no_grad()
def patching_claims(cfg):
    """Sweeps over two prompts of 16 tokens that all differ, and attribution to all activations."""
    model = GPT(ModelConfig(**QUICK if cfg.quick else GPT2_SMALL)).eval()
    clean, corrupted = random_tokens(model.cfg, 2, 16)[:, None]
    metric, target = Metric.logit_diff(5, 7), torch.zeros(model.cfg.d_vocab)
    target[5], target[7] = 1, -1
    _, cache = model.run_with_cache(clean)
    bridge, claims = None, []
    if installed("transformer_lens") and not cfg.quick:
        with tempfile.TemporaryDirectory() as folder:
            bridge = lens_bridge(model, Path(folder))
    for name, sweep in SWEEPS.items():
        run, activation, _, _, mark = sweep
        contestants = {
            "sweep": lambda run=run: run(model, corrupted, cache, metric),
            "loop": loop_over_cells(model, corrupted, cache, metric=metric,
                                    activation=activation)}
        if bridge is not None:
            contestants["TransformerLens"] = lens_sweep(bridge, corrupted, clean, sweep=sweep,
                                                        target=target)
        n_cells = contestants["sweep"]().values.numel()
        seconds = take_turns(contestants, min(cfg.rounds, 3 if n_cells > 1000 else 5))
        for other in list(contestants)[1:]:
            marked = other == "TransformerLens"
            claims.append(claim_of(
                f"patching 1 x 16, {name}, {n_cells:,} cells: times as fast as "
                f"{'our own loop' if other == 'loop' else other}",
                seconds[other] / CELLS * n_cells / seconds["sweep"],
                at_least=mark if marked else None))
    names = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")
    seconds = take_turns({
        "forward": lambda: model(corrupted),
        "attribution": lambda: attribution_patching(
            model, corrupted, cache, metric, names=names, axes=("layer", "pos", "head"))},
        cfg.rounds)
    return [*claims, claim_of("attribution patching of all nodes, 1 x 16: time over forward",
                              seconds["attribution"] / seconds["forward"],
                              at_most=None if cfg.quick else 3.0)]
