"""How fast it is: against what the machine can do, and against other libraries.

    python experiments/benchmark.py             # ten minutes, one thread
    python experiments/benchmark.py --quick     # seconds: that it runs, not how fast

Claim: that every activation can be read and edited costs nothing while nobody does it, little while
somebody does, and a run takes the time of its products.
Expected: every mark is met and the exit code is 0; a missed mark exits with 1.

All contestants of a group take turns in one process, round after round, so a drift of the machine
hits them alike. A ratio is taken within each round; its median over the rounds is given with the
lowest and the highest. Seconds mean little on a shared machine.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Read before: model.py, train.py; after: nothing
Source: compared with Hugging Face's transformers and TransformerLens where they are installed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import plotting
from config import (
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    check_field,
    option,
)
from experiments.benchmark_tools import (
    GPT2_SMALL,
    QUICK,
    installed,
    lens_bridge,
    patching_claims,
    random_tokens,
    reading_claims,
)
from experiments.benchmark_trainings import experiment_claims
from experiments.common import claim_of, perform, take_turns
from generate import generate
from losses import cross_entropy
from mlp import gelu
from model import GPT
from train import fit
from utils import run_program, seeded_generator

ROOT = Path(__file__).resolve().parent.parent
NANO = {"n_layers": 4, "n_heads": 4, "d_model": 128, "n_ctx": 64, "d_vocab": 65}
DEFAULT = {"d_vocab": 65}
LARGE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "n_ctx": 256, "d_vocab": 65}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the benchmark measures, and with what patience."""

    threads: int = option(1, "CPU threads")
    rounds: int = option(9, "rounds of each group, 5 or more for a result")
    quick: bool = option(False, "tiny shapes, one round, no marks")
    out_dir: str = option("outputs", "the folder that benchmark/ is written to")

    def __post_init__(self):
        for name in ("threads", "rounds"):
            check_field(self, name, lambda n: n >= 1, "1 or more")


def matmul_flops(cfg, batch):
    """Operations in the matrix products of one forward at full context: two for each weight and
    token, and the two products of attention over the whole square."""
    weights = cfg.n_layers * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_mlp)
    weights += cfg.d_model * cfg.d_vocab
    attention = cfg.n_layers * 2 * cfg.n_ctx * cfg.d_model
    return 2 * batch * cfg.n_ctx * (weights + attention)


def our_step(cfg, batch, optimizer):
    """A function that makes one training step of `fit`, on the same tokens each time."""
    tokens = random_tokens(cfg, batch, cfg.n_ctx + 1)
    settings = TrainConfig(max_steps=10**9, batch_size=batch, optimizer=optimizer)
    steps = fit(GPT(cfg), lambda: (tokens[:, :-1], tokens[:, 1:]), settings)
    return lambda: next(steps)


def hugging_face_model(cfg):
    """Hugging Face's GPT-2 of that shape, without dropout."""
    library = importlib.import_module("transformers")
    return library.GPT2LMHeadModel(library.GPT2Config(
        vocab_size=cfg.d_vocab, n_positions=cfg.n_ctx, n_embd=cfg.d_model, n_layer=cfg.n_layers,
        n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    ))


def hugging_face_step(cfg, batch):
    """One training step of Hugging Face's GPT-2 with torch's fused AdamW."""
    model = hugging_face_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(cfg, batch, cfg.n_ctx + 1)

    def step():
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def training_claims(cfg):
    """Training steps, with the fused attention that runs while nobody listens: tokens a second, and
    the share of the rate at which 1024 x 1024 matrices are multiplied."""
    size = 128 if cfg.quick else 1024
    left, right = torch.randn(2, size, size, generator=seeded_generator(0))
    groups = [("nanoGPT's CPU shape, AdamW", NANO, 12, "adamw"),
              ("the default shape, Muon", DEFAULT, 12, "muon"),
              ("6 layers of 384, context 256, Muon", LARGE, 4, "muon")]
    claims = []
    for name, shape, batch, optimizer in groups:
        model = ModelConfig(**QUICK if cfg.quick else shape)
        contestants = {"product": lambda: left @ right, name: our_step(model, batch, optimizer)}
        against_others = shape is NANO and installed("transformers")
        if against_others:
            contestants["Hugging Face"] = hugging_face_step(model, batch)
        seconds = take_turns(contestants, cfg.rounds)
        ideal = 3 * matmul_flops(model, batch) / (2 * size**3) * seconds["product"]  # 1 + 2 ways
        marked = shape is NANO and not cfg.quick
        claims.append(claim_of(f"training, {name}, batch {batch}: share of the matmul rate",
                               ideal / seconds[name], at_least=0.66 if marked else None))
        claims.append(claim_of(f"training, {name}, batch {batch}: tokens a second",
                               batch * model.n_ctx / seconds[name]))
        if against_others:
            claims.append(claim_of(f"training, {name}: times as fast as Hugging Face's",
                                   seconds["Hugging Face"] / seconds[name],
                                   at_least=1.2 if marked else None))
    return claims


def weight_products(model, tokens):
    """A function with the products of all weights with as many rows as there are tokens, alone."""
    cfg = model.cfg
    narrow, wide = (torch.randn(tokens.numel(), width) for width in (cfg.d_model, cfg.d_mlp))

    def products():
        for block in model.blocks:
            narrow @ block.attn.W_QKV
            narrow @ block.attn.W_heads_out
            narrow @ block.mlp.W_in
            wide @ block.mlp.W_out
        narrow @ model.W_U

    return products


def without_hook_points(model, tokens):
    """The logits by the same kernels in the same order, written without a hook point in it."""
    resid = F.embedding(tokens, model.W_E) + F.embedding(torch.arange(tokens.shape[1]), model.W_pos)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        qkv = (norm(resid, block.ln1) @ attn.W_QKV).add_(attn.b_QKV)
        q, k, v = qkv.unflatten(-1, (3, attn.n_heads, attn.d_head)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        resid = resid + (z @ attn.W_heads_out).add_(attn.b_heads_out)
        post = gelu((norm(resid, block.ln2) @ mlp.W_in).add_(mlp.b_in))
        resid = resid + (post @ mlp.W_out).add_(mlp.b_out)
    return F.linear(norm(resid, model.ln_final), model.W_U.T)


def norm(resid, layer_norm):
    """LayerNorm in one kernel."""
    return F.layer_norm(resid, layer_norm.w.shape, layer_norm.w, layer_norm.b, 1e-5)


@torch.no_grad()
def forward_claims(cfg):
    """Forward passes and full caching at GPT-2 small's shape."""
    model_cfg = ModelConfig(**QUICK if cfg.quick else GPT2_SMALL)
    model, claims = GPT(model_cfg), []
    others = {}
    if installed("transformers"):
        others["Hugging Face"] = hugging_face_model(model_cfg).eval()
    if installed("transformer_lens") and not cfg.quick:
        with tempfile.TemporaryDirectory() as folder:
            others["TransformerLens"] = lens_bridge(model, Path(folder))
        others["TransformerLens, caching"] = others["TransformerLens"].run_with_cache
    for batch in (1, 8):
        tokens = random_tokens(model_cfg, batch, 64)
        torch.testing.assert_close(model(tokens), without_hook_points(model, tokens))
        contestants = {
            "forward": lambda tokens=tokens: model(tokens),
            "weight products": weight_products(model, tokens),
            "without hook points": lambda tokens=tokens: without_hook_points(model, tokens),
            "caching": lambda tokens=tokens: model.run_with_cache(tokens),
        } | {name: lambda run=run, tokens=tokens: run(tokens) for name, run in others.items()}
        rounds = cfg.rounds * (3 if batch == 1 and not cfg.quick else 1)
        seconds = take_turns(contestants, rounds)
        for what, against, most in (("forward", "weight products", 1.10),
                                    ("forward", "without hook points", 1.01),
                                    ("caching", "forward", 1.05)):
            claims.append(claim_of(f"{batch} x 64: time of {what} over {against}",
                                   seconds[what] / seconds[against],
                                   at_most=None if cfg.quick else most))
        for name in others:
            own = "caching" if "caching" in name else "forward"
            claims.append(claim_of(f"{batch} x 64: time of {name} over our {own}",
                                   seconds[name] / seconds[own]))
    return claims


@torch.no_grad()
def decoding_claims(cfg):
    """Text from GPT-2 small's shape; each token takes at least the time to read all weights."""
    model = GPT(ModelConfig(**QUICK if cfg.quick else GPT2_SMALL)).eval()
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
    claims = [claim_of(f"{name}: tokens a second", n_new / seconds["decoding"]),
              claim_of(f"{name}: share of the rate at which the weights can be read",
                       n_new * seconds["reading the weights"] / seconds["decoding"])]
    if "Hugging Face" in contestants:
        claims.append(claim_of(f"{name}: times as fast as Hugging Face's generate",
                               seconds["Hugging Face"] / seconds["decoding"],
                               at_least=None if cfg.quick else 1.0))
    return claims


def start_claims(cfg):
    """From the start of Python to the first logits, over the start of Python and torch alone."""
    logits = ("import torch; from config import ModelConfig; from model import GPT; "
              "GPT(ModelConfig(d_vocab=65))(torch.zeros(1, 8, dtype=torch.long))")

    def start(code):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    seconds = take_turns({"first logits": lambda: start(logits),
                          "import torch": lambda: start("import torch")}, cfg.rounds)
    later = seconds["first logits"] - seconds["import torch"]
    return [claim_of("seconds from torch imported to the first logits", later,
                     at_most=None if cfg.quick else 0.3)]


def run(cfg, folder):
    """{"claims": list of Claim}. cfg: a BenchmarkConfig."""
    cfg = dataclasses.replace(cfg, rounds=1) if cfg.quick else cfg
    parts = (training_claims, forward_claims, decoding_claims, reading_claims, patching_claims,
             start_claims, experiment_claims)
    return {"claims": [claim for part in parts for claim in part(cfg)]}


def figures(result):
    """The Figure of the claims that have a mark: how many times as good as it each is."""
    marked, rows = [claim for claim in result["claims"] if claim.holds is not None], {}
    for claim in marked:
        sign = -1 if claim.control.startswith("at most") else 1
        found = (claim.measured, claim.low, claim.high)
        rows[f"{claim.claim} ({claim.control})"] = [
            min(30.0, (max(value, 1e-9) / claim.mark) ** sign) for value in found]
    return {"benchmark": plotting.dot_rows(
        rows, title=f"{sum(claim.holds for claim in marked)} of {len(marked)} marks are met",
        xlabel="times as good as its mark, at most 30 (dot: median, bar: all rounds)",
    )} if marked else {}


def main(argv=None):
    """The program: measures, prints the table, writes outputs/benchmark; a missed mark exits 1."""
    perform(BenchmarkConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
