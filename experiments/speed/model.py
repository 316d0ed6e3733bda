"""Make the functions that the benchmark times: training steps, forward passes, sweeps, trainings.

Each is a function without arguments. Some are this project's, others those of other libraries.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Prerequisites: model.py, train.py, hooks.py
Next: experiments/speed/measure.py
Source: compared with Hugging Face's transformers and TransformerLens if they are installed
"""

import copy
import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

import torch

from config import PRESETS, TrainConfig
from experiments.dictionaries.model import DictionaryRecipe
from experiments.grokking.model import (
    CANONICAL_ADDITION,
    QUICK_ADDITION,
    GrokkingRecipe,
    train_to_add,
)
from experiments.induction.model import InductionRecipe, trained_induction_model
from experiments.superposition.model import toy_jobs
from losses import cross_entropy
from model import GPT
from optim import AdamW
from tokenizer import BPETokenizer
from train import fit
from utils import seeded_generator

GPT2_SMALL_SHAPE = PRESETS["gpt2"] | {"d_vocab": 50257}
NANOGPT_SHAPE = {"n_layers": 4, "n_heads": 4, "d_model": 128, "n_ctx": 64, "d_vocab": 65}
DEFAULT_SHAPE = {"d_vocab": 65}
LARGE_SHAPE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "n_ctx": 256, "d_vocab": 65}
TINY_SHAPE = {"n_layers": 1, "n_heads": 2, "d_model": 16, "n_ctx": 64, "d_vocab": 65}
N_CELLS = 8  # cells of a sweep that the plain loop runs


def dictionary_recipes(quick):
    """{name: (DictionaryRecipe, d_model)} of the dictionaries that are timed."""
    n_latents, batch, d_model = (64, 32, 16) if quick else (2048, 1024, 256)
    return {kind: (DictionaryRecipe(kind, sparsity, n_latents, batch=batch), d_model)
            for kind, sparsity in (("ReLU + L1", 0.1), ("TopK", 16 if quick else 32))}


def random_tokens(cfg, batch, pos):
    """Random ids [batch, pos], the same in every call."""
    return torch.randint(cfg.d_vocab, (batch, pos), generator=seeded_generator(0))


def installed(package):
    """Whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None


# Training


def our_step(cfg, batch, optimizer):
    """A function that runs one training step of `fit`, always on the same tokens."""
    tokens = random_tokens(cfg, batch, cfg.n_ctx + 1)
    settings = TrainConfig(max_steps=10**9, batch_size=batch, optimizer=optimizer)
    steps = fit(GPT(cfg), lambda: (tokens[:, :-1], tokens[:, 1:]), settings)
    return lambda: next(steps)


def dictionary_step(recipe, d_model):
    """A function that runs one training step of a dictionary, always on the same batch."""
    generator = seeded_generator(0)
    dictionary = recipe.fresh(d_model, d_model, generator)
    optimizer = AdamW(dictionary.parameters(), lr=1e-3, weight_decay=0.0)
    x = torch.randn(recipe.batch, d_model, generator=generator) / d_model**0.5

    def step():
        dictionary.backward_(x, x)
        optimizer.step()
        dictionary.normalise_()

    return step


def hugging_face_model(cfg):
    """Hugging Face's GPT-2 with the shape of a ModelConfig, without dropout."""
    library = importlib.import_module("transformers")
    return library.GPT2LMHeadModel(library.GPT2Config(
        vocab_size=cfg.d_vocab, n_positions=cfg.n_ctx, n_embd=cfg.d_model, n_layer=cfg.n_layers,
        n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    ))


def hugging_face_step(cfg, batch):
    """A function that runs one training step of Hugging Face's GPT-2 with torch's fused AdamW."""
    model = hugging_face_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(cfg, batch, cfg.n_ctx + 1)

    def step():
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# Forward passes


def weight_products(model, tokens):
    """A function that only multiplies all weights, with as many rows as there are tokens."""
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


class NotedPoint:
    """Replaces a hook point and records when it is called, and when its listeners are read.

    point: the HookPoint. called, asked: the lists in which it records them.
    """

    def __init__(self, point, called, asked):
        self.point = point
        self.called = called
        self.asked = asked

    def __call__(self, tensor):
        self.called.append(self.point)
        return tensor

    @property
    def listeners(self):
        """No listeners; records that they were read."""
        self.asked.append(self.point)
        return []


def passed_hook_points(model, tokens):
    """(called, asked): the HookPoints that a forward pass without listeners calls, and those whose
    listeners it reads, in order and as often as it does so.

    The points belong to a copy of the model that shares its weights.
    """
    noted = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    called = []
    asked = []
    for name, point in noted.hook_points().items():
        path, _, attribute = name.rpartition(".")
        setattr(noted.get_submodule(path), attribute, NotedPoint(point, called, asked))
    noted(tokens)
    return called, asked


def hook_point_work(model, tokens):
    """A function that does only the work of a forward pass's hook points without listeners: every
    call, and every reading of the listeners."""
    called, asked = passed_hook_points(model, tokens)
    resid = model.embed(tokens)

    def work():
        for point in called:
            point(resid)
        for point in asked:
            assert not point.listeners

    return work


# Sweeps


def loop_over_cells(model, tokens, source, *, metric, activation):
    """A function that runs N_CELLS cells in a plain loop, with a whole forward pass for each."""
    def patch(own, hook):
        return source[hook.name]

    part = "attn." if activation == "z" else ""
    names = [f"blocks.{layer}.{part}hook_{activation}" for layer in range(model.cfg.n_layers)]
    return lambda: [metric(model.run_with_hooks(tokens, [(names[cell % len(names)], patch)]))
                    for cell in range(N_CELLS)]


def lens_bridge(model, folder):
    """TransformerLens's model with the same weights, read from a folder in Hugging Face's layout.
    """
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


def lens_sweep(bridge, tokens, clean_tokens, *, activation, setter, axes, target):
    """A function that runs N_CELLS cells of TransformerLens's own sweep.

    activation, setter, axes: as in a `measure.TimedSweep`. target: [d_vocab], 1 and -1 at two ids.
    """
    library = importlib.import_module("transformer_lens.patching")
    library.tqdm = lambda rows: rows  # its progress bar
    cells = importlib.import_module("pandas").DataFrame(
        [[cell % bridge.cfg.n_layers, *[cell % 4] * (len(axes) - 1)] for cell in range(N_CELLS)],
        columns=axes)
    _, cache = bridge.run_with_cache(clean_tokens)
    return lambda: library.generic_activation_patch(
        bridge, tokens, cache, lambda logits: (logits[:, -1] @ target).mean(),
        getattr(library, setter), activation, index_df=cells)


# The experiments' trainings


def experiment_trainings(quick):
    """{name: (a function that trains a model, the most seconds that it may take)}, one of each
    kind of experiment."""
    jobs = toy_jobs(quick=quick)
    if quick:
        induction_recipe = InductionRecipe(steps=10)
        addition = canonical = GrokkingRecipe(**QUICK_ADDITION)
    else:
        induction_recipe = InductionRecipe()
        addition = GrokkingRecipe()
        canonical = GrokkingRecipe(**CANONICAL_ADDITION, symmetric=False)

    def train_induction():
        with tempfile.TemporaryDirectory() as folder:
            trained_induction_model(Path(folder), 0, induction_recipe)

    def train_toys(*names):
        for name in names:
            jobs[name].train(0)

    def train_adder(recipe):
        train_to_add(GPT(recipe.model_config(), recipe.seed), recipe, f"p = {recipe.p}")

    return {
        "induction heads from nothing": (train_induction, 60),
        "five features in a plane": (lambda: train_toys("polytopes"), 6),
        "200 features in 20 dimensions": (lambda: train_toys("geometry"), 40),
        "both phase diagrams": (lambda: train_toys("phases 2,1", "phases 3,2"), 60),
        "grokking, p = 59": (lambda: train_adder(addition), 30),
        "grokking, p = 113": (lambda: train_adder(canonical), 180),
    }
