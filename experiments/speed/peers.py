"""Make the functions of other libraries that the benchmark times beside this project's own.

Hugging Face's transformers and TransformerLens are optional: what is not installed is not timed.
Their models have random weights, as ours have; the time does not depend on them.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: model.py, circuits.py, experiments/speed/model.py
Next: experiments/speed/rows.py
Source: Hugging Face's transformers; TransformerLens (Nanda & Bloom 2022)
"""

import functools
import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

import torch

from experiments.speed.model import GPT2_SMALL_SHAPE, N_CELLS
from losses import cross_entropy
from model import GPT
from tokenizer import BPETokenizer

HUGGING_FACE = "Hugging Face"
TRANSFORMER_LENS = "TransformerLens"


def installed(package):
    """Whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None


class Peers:
    """The other libraries' models of GPT-2 small's shape; None for a library that isn't installed.

    setting: a Setting; on its device and in its precision.
    """

    def __init__(self, setting):
        self.setting = setting

    @functools.cached_property
    def hugging_face(self):
        """Hugging Face's GPT2LMHeadModel."""
        if not installed("transformers"):
            return None
        return self.setting.place(hugging_face_model(self.setting.shape(GPT2_SMALL_SHAPE)))

    @functools.cached_property
    def transformer_lens(self):
        """TransformerLens's TransformerBridge. It takes no tiny shape, so a quick run has none."""
        if self.setting.quick or not installed("transformer_lens"):
            return None
        return self.setting.place(lens_bridge(GPT(self.setting.shape(GPT2_SMALL_SHAPE))))


def hugging_face_model(cfg):
    """Hugging Face's GPT-2 with the shape of a ModelConfig, without dropout."""
    library = importlib.import_module("transformers")
    return library.GPT2LMHeadModel(library.GPT2Config(
        vocab_size=cfg.d_vocab, n_positions=cfg.n_ctx, n_embd=cfg.d_model, n_layer=cfg.n_layers,
        n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    ))


def hugging_face_step(model, tokens, dtype):
    """A function that runs one training step of Hugging Face's GPT-2 with torch's fused AdamW.

    dtype: of the products; weights and loss are in float32.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    is_half = dtype == torch.bfloat16

    def step():
        optimizer.zero_grad()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=is_half):
            logits = model(tokens[:, :-1]).logits
        cross_entropy(logits.float(), tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def hugging_face_decoding(model, tokens, n_new):
    """A function that decodes n_new tokens with Hugging Face's `generate`, with its cache."""
    mask = torch.ones_like(tokens)
    limits = {"max_new_tokens": n_new, "min_new_tokens": n_new, "use_cache": True}
    return lambda: model.generate(tokens, attention_mask=mask, do_sample=False, **limits)


def lens_bridge(model):
    """TransformerLens's model with the same weights, read from a folder in Hugging Face's layout.
    """
    library = importlib.import_module("transformer_lens")
    pieces = BPETokenizer().state_dict()["tokens"]
    vocab = {token: number for number, token in enumerate([*pieces, "<|endoftext|>"])}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2Tokenizer"} | special))
        return library.TransformerBridge.boot_transformers(str(folder))


def lens_sweep(bridge, tokens, clean_tokens, *, activation, setter, axes):
    """A function that runs N_CELLS cells of TransformerLens's own sweep.

    activation: what is patched. setter: the name of TransformerLens's function that patches it.
    axes: of the sweep. The metric is the logit difference of the ids 5 and 7.
    """
    library = importlib.import_module("transformer_lens.patching")
    library.tqdm = lambda rows: rows  # its progress bar
    cells = importlib.import_module("pandas").DataFrame(
        [[cell % bridge.cfg.n_layers, *[cell % 4] * (len(axes) - 1)] for cell in range(N_CELLS)],
        columns=axes)
    _, cache = bridge.run_with_cache(clean_tokens)
    return lambda: library.generic_activation_patch(
        bridge, tokens, cache, lambda logits: (logits[:, -1, 5] - logits[:, -1, 7]).mean(),
        getattr(library, setter), activation, index_df=cells)
