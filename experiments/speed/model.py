"""Make what the benchmark's rows run: models at one setting, training steps, loops over cells.

A setting is a device, a precision, and whether models are compiled. Each row's function takes no
arguments, and does the row's work once.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Prerequisites: model.py, train.py, hooks.py
Next: experiments/speed/floors.py
Source: none
"""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import torch

from config import PRESETS, ModelConfig, TrainConfig
from experiments.dictionaries.model import DictionaryRecipe
from model import GPT
from optim import AdamW, make_optimizers
from patching import path_patch
from train import fit
from utils import UserError, pick_device, seeded_generator

ROOT = Path(__file__).resolve().parent.parent.parent
GPT2_SMALL_SHAPE = PRESETS["gpt2"] | {"d_vocab": 50257}
NANOGPT_SHAPE = {"n_layers": 4, "n_heads": 4, "d_model": 128, "n_ctx": 64, "d_vocab": 65}
DEFAULT_SHAPE = {"d_vocab": 65}
LARGE_SHAPE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "n_ctx": 256, "d_vocab": 65}
ACDC_SHAPE = {"n_layers": 2, "n_heads": 8, "d_model": 128, "n_ctx": 64, "d_vocab": 65}
SCALING_SHAPE = {"n_layers": 4, "n_heads": 8, "d_model": 256, "n_ctx": 1024, "d_vocab": 512}
TINY_SHAPE = {"n_heads": 2, "d_model": 16, "n_ctx": 64, "d_vocab": 65}
N_CELLS = 8  # cells of a sweep that a plain loop runs
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


class Setting:
    """Where and how the rows run.

    cfg: a BenchmarkConfig. Raises UserError if the device does not exist or lacks the precision.
    """

    def __init__(self, cfg):
        self.device = pick_device(cfg.device)
        if cfg.precision == "tf32" and self.device.type != "cuda":
            raise UserError(f"precision=tf32 is a GPU's, and the device is {self.device}; choose "
                            "float32 or bfloat16")
        self.precision = cfg.precision
        self.dtype = DTYPES[cfg.precision]
        self.compile = cfg.compile
        self.quick = cfg.quick
        self.threads = cfg.threads

    @property
    def on_gpu(self):
        """Whether the rows run on a GPU, which computes while the program goes on."""
        return self.device.type != "cpu"

    def shape(self, shape):
        """The ModelConfig of a shape; in a quick run a tiny one, with two layers at most."""
        if self.quick:
            n_layers = min(2, shape.get("n_layers", 2))
            shape = TINY_SHAPE | {"n_layers": n_layers}
        return ModelConfig(**shape)

    def place(self, model):
        """A model on the device, in the precision of the setting."""
        return model.to(self.device, self.dtype).eval()

    def model(self, shape):
        """A GPT of a shape, placed. Its weights are random, which does not change the time."""
        return self.place(GPT(self.shape(shape)))

    @functools.cached_property
    def gpt2_small(self):
        """A GPT of GPT-2 small's shape, made once for all rows."""
        return self.model(GPT2_SMALL_SHAPE)

    def compiled(self, model):
        """What runs a model's forward pass: compiled, if the setting says so."""
        return torch.compile(model) if self.compile else model

    def tokens(self, cfg, batch, pos, seed=0):
        """Random ids [batch, pos], the same in every call."""
        ids = torch.randint(cfg.d_vocab, (batch, pos), generator=seeded_generator(seed))
        return ids.to(self.device)


# Training


def training_step(setting, cfg, batch, optimizer):
    """A function that runs one training step of `fit`, always on the same tokens."""
    tokens = setting.tokens(cfg, batch, cfg.n_ctx + 1)
    precision = "bfloat16" if setting.precision == "bfloat16" else "float32"
    settings = TrainConfig(max_steps=10**9, batch_size=batch, optimizer=optimizer,
                           precision=precision)
    model = GPT(cfg).to(setting.device)
    steps = fit(setting.compiled(model), lambda: (tokens[:, :-1], tokens[:, 1:]), settings,
                optimizers=make_optimizers(model, settings))
    return lambda: next(steps)


def dictionary_step(kind, sparsity, *, batch, d_model, n_latents):
    """A function that runs one training step of a dictionary, always on the same batch."""
    generator = seeded_generator(0)
    recipe = DictionaryRecipe(kind, sparsity, n_latents, batch=batch)
    dictionary = recipe.fresh(d_model, d_model, generator)
    optimizer = AdamW(dictionary.parameters(), lr=1e-3, weight_decay=0.0)
    x = torch.randn(batch, d_model, generator=generator) / d_model**0.5

    def step():
        dictionary.backward_(x, x)
        optimizer.step()
        dictionary.normalise_()

    return step


# Forward passes


def weight_products(model, tokens):
    """A function that only multiplies all weights, with as many rows as there are tokens."""
    cfg = model.cfg
    narrow = model.W_E.new_ones(tokens.numel(), cfg.d_model)
    wide = model.W_E.new_ones(tokens.numel(), cfg.d_mlp)

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


def loop_over_cells(model, tokens, source, metric, activation):
    """A function that runs N_CELLS cells in a plain loop, with a whole forward pass for each."""
    def patch(own, hook):
        return source[hook.name]

    part = "attn." if activation == "z" else ""
    names = [f"blocks.{layer}.{part}hook_{activation}" for layer in range(model.cfg.n_layers)]
    return lambda: [metric(model.run_with_hooks(tokens, [(names[cell % len(names)], patch)]))
                    for cell in range(N_CELLS)]


def loop_over_paths(model, clean_tokens, corrupted_tokens, metric):
    """A function that patches N_CELLS paths from head to head, one after another."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    pairs = [(layer, later) for layer in range(n_layers) for later in range(layer + 1, n_layers)]

    def loop():
        for cell in range(N_CELLS):
            layer, later = pairs[cell % len(pairs)]
            head = cell % n_heads
            path_patch(model, clean_tokens, corrupted_tokens, (f"blocks.{layer}.attn.hook_z", head),
                       (f"blocks.{later}.hook_v_input", head), metric)

    return loop


# Starting, and reading text


def start_python(code, n_threads):
    """Run a program in a new Python that knows this project, with n_threads CPU threads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(n_threads)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def own_text():
    """The project's own code as a text of a million characters, which needs no download."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py")))
