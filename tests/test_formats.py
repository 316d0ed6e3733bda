"""Other projects' models: written here in their published layouts, read, and run on both sides.

Neither TransformerLens nor Tracr is used. A writer makes the files, and a forward pass of a dozen
lines, with their names, gives the logits in float64.
"""

import argparse
import errno
import io
import json
import math
import os
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal, scramble_, tiny_model, tiny_tokens
from test_checkpoint import Attack

import checkpoint
import formats
import generate
import pretrained
from checkpoint import load_model, load_pretrained
from config import Config, ModelConfig
from model import GPT
from tokenizer import BPETokenizer, CharTokenizer
from utils import seeded_generator

# TransformerLens: its state dict, its config, and its logits, all by hand

LENS = {"n_layers": 2, "n_heads": 3, "d_model": 12, "d_head": 5, "d_mlp": 14, "n_ctx": 9,
        "d_vocab": 11, "d_vocab_out": 7, "act_fn": "gelu", "attn_only": False,
        "normalization_type": "LN", "eps": 1e-5, "use_attn_scale": True, "attn_scale": -1.0,
        "positional_embedding_type": "standard", "attention_dir": "causal", "seed": None,
        "final_rms": False, "gated_mlp": False, "tokenizer_name": None, "num_experts": None,
        "n_key_value_heads": None, "output_logits_soft_cap": -1.0, "device": "cuda"}
TOKENS = tiny_tokens()


def lens_config(**changes):
    return LENS | changes


def lens_weights(cfg, seed=0, biases=True):
    """{TransformerLens's name: tensor} of a config; all of ordinary size."""
    generator = seeded_generator(seed)

    def draw(*shape, around=0.0):
        return around + 0.4 * torch.randn(shape, generator=generator)

    def norm(at):
        has = cfg["normalization_type"] == "LN"
        return {f"{at}.w": draw(d_model, around=1), f"{at}.b": draw(d_model)} if has else {}

    d_model, n_heads, d_head = cfg["d_model"], cfg["n_heads"], cfg["d_head"]
    named = {"embed.W_E": draw(cfg["d_vocab"], d_model),
             "pos_embed.W_pos": draw(cfg["n_ctx"], d_model)}
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}"
        named |= norm(f"{at}.ln1")
        for letter in "QKV":
            named[f"{at}.attn.W_{letter}"] = draw(n_heads, d_model, d_head)
            named[f"{at}.attn.b_{letter}"] = draw(n_heads, d_head)
        named[f"{at}.attn.W_O"] = draw(n_heads, d_head, d_model)
        named[f"{at}.attn.b_O"] = draw(d_model)
        named[f"{at}.attn.mask"] = torch.ones(cfg["n_ctx"], cfg["n_ctx"], dtype=torch.bool).tril()
        named[f"{at}.attn.IGNORE"] = torch.tensor(-torch.inf)
        if not cfg["attn_only"]:
            named |= norm(f"{at}.ln2")
            named |= {f"{at}.mlp.W_in": draw(d_model, cfg["d_mlp"]),
                      f"{at}.mlp.b_in": draw(cfg["d_mlp"]),
                      f"{at}.mlp.W_out": draw(cfg["d_mlp"], d_model),
                      f"{at}.mlp.b_out": draw(d_model)}
    named |= norm("ln_final")
    named |= {"unembed.W_U": draw(d_model, cfg["d_vocab_out"]),
              "unembed.b_U": draw(cfg["d_vocab_out"])}
    return {name: tensor for name, tensor in named.items() if biases or ".b_" not in name}


ACTS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
}


def lens_logits(named, cfg, tokens, divisors=None):
    """The logits of a HookedTransformer in float64, one head at a time.

    divisors: what the scores are divided by, one for each layer.
    """
    w = {name: tensor.double() for name, tensor in named.items()}

    def norm(x, at):
        if cfg["normalization_type"] is None:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + cfg["eps"]).sqrt()
        return x * w.get(f"{at}.w", 1) + w.get(f"{at}.b", 0)

    resid = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}.attn"
        x = norm(resid, f"blocks.{layer}.ln1")
        resid = resid + w.get(f"{at}.b_O", 0)
        for head in range(cfg["n_heads"]):
            q, k, v = (x @ w[f"{at}.W_{letter}"][head] + (w[f"{at}.b_{letter}"][head]
                       if f"{at}.b_{letter}" in w else 0) for letter in "QKV")
            divisor = math.sqrt(cfg["d_head"]) if divisors is None else divisors[layer]
            weights = (q @ k.transpose(1, 2) / divisor).exp().tril()
            z = weights / weights.sum(-1, keepdim=True) @ v
            resid = resid + z @ w[f"{at}.W_O"][head]
        if not cfg["attn_only"]:
            at = f"blocks.{layer}.mlp"
            hidden = norm(resid, f"blocks.{layer}.ln2") @ w[f"{at}.W_in"] + w.get(f"{at}.b_in", 0)
            resid = resid + ACTS[cfg["act_fn"]](hidden) @ w[f"{at}.W_out"] + w.get(f"{at}.b_out", 0)
    return norm(resid, "ln_final") @ w["unembed.W_U"] + w.get("unembed.b_U", 0)


def write_lens(folder, cfg, named, file="model.pth"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    if file.endswith("safetensors"):
        pretrained.write_safetensors(folder / file, named)
    else:
        torch.save(named, folder / file)
    return folder


def check_close(logits, wanted, case="", tolerance=1e-5):
    off = ((logits.double() - wanted).norm() / wanted.norm()).item()
    assert logits.shape == wanted.shape and off < tolerance, f"{case}: logits are off by {off:.1e}"


SHAPES = [
    {}, {"normalization_type": "LNPre", "act_fn": "gelu_new"},
    {"normalization_type": None, "act_fn": "relu"}, {"eps": 0.03},
    {"attn_only": True, "act_fn": None, "normalization_type": None},
    {"attn_only": True, "n_layers": 3, "d_head": 4, "d_vocab_out": 11},
    {"n_heads": 1, "d_head": 12, "d_mlp": 1, "normalization_type": "LNPre"},
    {"n_layers": 1, "n_heads": 5, "d_model": 6, "d_head": 1, "d_vocab_out": 1},
    {"n_layers": 0},
]


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("file", ["model.pth", "a.pt", "b.safetensors"])
def test_a_transformer_lens_folder_gives_its_logits(tmp_path, file, biases):
    for number, changes in enumerate(SHAPES):
        cfg = lens_config(**changes)
        named = lens_weights(cfg, number, biases)
        model, tokenizer = load_model(write_lens(tmp_path / str(number), cfg, named, file))
        with torch.no_grad():
            check_close(model(TOKENS), lens_logits(named, cfg, TOKENS), f"{changes} {file}")
        assert tokenizer is None and not model.training, changes
        there = (model.cfg.attn_bias, model.cfg.unembed_bias)
        assert there == (biases and cfg["n_layers"] > 0, biases), changes


def test_a_lone_state_dict_gives_its_logits_when_activation_and_norm_are_told(tmp_path, capsys):
    path = tmp_path / "model.pt"
    words = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}
    for act_fn, activation in words.items():
        for normalization, norm in (("LN", None), ("LNPre", "layernorm"), (None, "none")):
            cfg = lens_config(act_fn=act_fn, normalization_type=normalization)
            torch.save(lens_weights(cfg), path)
            model, _ = load_model(path, activation=activation, norm=norm)
            check_close(model(TOKENS).detach(), lens_logits(torch.load(path), cfg, TOKENS),
                        f"{act_fn} {normalization}")
    assert f"{path}: read as TransformerLens" in capsys.readouterr().err


def test_the_tensors_may_lie_deeper_with_a_config_beside_them_and_have_a_prefix(tmp_path):
    cfg = lens_config(normalization_type="LNPre")
    named = lens_weights(cfg)
    wanted = lens_logits(named, cfg, TOKENS)
    contents = {"model": named, "config": cfg}, {"state_dict": named, "cfg": cfg, "epoch": 3}
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.pt")
        check_close(load_model(tmp_path / f"{number}.pt")[0](TOKENS).detach(), wanted)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in named.items()}, tmp_path / "c.pt")
    model, _ = load_model(tmp_path / "c.pt", activation="gelu_exact", norm="layernorm")
    check_close(model(TOKENS).detach(), wanted)


def test_a_config_beside_a_file_counts_for_it_unless_it_brings_its_own(tmp_path):
    cfg = lens_config(attn_scale=3.5, eps=0.2)  # neither of which the tensors show
    named = lens_weights(cfg)
    wanted = lens_logits(named, cfg, TOKENS, [3.5, 3.5])
    for theirs in ("eps", "ln_eps", "layer_norm_eps"):
        renamed = {theirs if name == "eps" else name: value for name, value in cfg.items()}
        folder = write_lens(tmp_path / "run", renamed, named, "step_1.pt")
        torch.save(named, folder / "step_2.pt")
        for file in ("step_1.pt", "step_2.pt"):
            check_close(load_model(folder / file)[0](TOKENS).detach(), wanted, file)
    assert "bidirectional" in refusal(lambda: load_model(write_lens(
        tmp_path / "run", cfg | {"attention_dir": "bidirectional"}, named) / "step_1.pt"))
    torch.save({"state_dict": named, "config": cfg}, folder / "step_2.pt")
    check_close(load_model(folder / "step_2.pt")[0](TOKENS).detach(), wanted)

    # Hugging Face's config says that the folder is the model; one of another kind says nothing
    tiny_model(tie_embeddings=True).save_pretrained(tmp_path / "gpt2")
    assert "give the folder" in refusal(lambda: load_model(tmp_path / "gpt2" / "model.safetensors"))
    (folder / "config.json").write_text('{"lr": 1}')
    assert "activation=..." in refusal(lambda: load_model(folder / "step_1.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_other_precision_become_float32(tmp_path, dtype):
    cfg = lens_config(attn_scale=2.0)
    named = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
             for name, tensor in lens_weights(cfg).items()}
    model, _ = load_model(write_lens(tmp_path, cfg, named))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    check_close(model(TOKENS).detach(), lens_logits(named, cfg, TOKENS, [2.0, 2.0]))


def test_another_scale_of_the_scores_is_folded_into_the_queries(tmp_path):
    root = math.sqrt(LENS["d_head"])
    cases = [({"use_attn_scale": False}, [1, 1]), ({"attn_scale": 3.5}, [3.5, 3.5]),
             ({"scale_attn_by_inverse_layer_idx": True}, [root, 2 * root]),
             ({"attn_scale": None}, [root, root]),
             ({"use_attn_scale": False, "attn_scale": 9}, [1, 1])]
    for changes, divisors in cases:
        cfg = lens_config(**changes)
        for biases in (True, False):
            named = lens_weights(cfg, biases=biases)
            model, _ = load_model(write_lens(tmp_path, cfg, named))
            check_close(model(TOKENS).detach(), lens_logits(named, cfg, TOKENS, divisors), changes)


# What is refused


def test_models_of_another_kind_are_refused_by_their_names(tmp_path):
    named = lens_weights(LENS)
    fields = {
        "attention_dir": ("bidirectional", "both directions"), "final_rms": (True, "RMS"),
        "positional_embedding_type": ("rotary", "rotary"), "shortformer_pos": (True, "shortformer"),
        "use_local_attn": (True, "local"), "parallel_attn_mlp": (True, "parallel"),
        "gated_mlp": (True, "gated"), "use_normalization_before_and_after": (True, "post-LN"),
        "output_logits_soft_cap": (30.0, "soft cap"), "attn_scores_soft_cap": (50.0, "soft cap"),
        "num_experts": (4, "experts"), "n_key_value_heads": (1, "share"),
        "use_qk_norm": (True, "norm"), "post_embedding_ln": (True, "embedding"),
        "normalization_type": ("RMS", "LNPre"), "act_fn": ("solu_ln", "gelu_new"),
        "use_attn_scale": ("no", "true"), "attn_scale": (1e-300, "between"),
        "eps": (10**400, "0 to 1"), "attn_only": (True, "two models"),
        "n_heads": (4, "two models"), "n_layers": (10**9, "two models"),
        "d_vocab": ([5], "two models"),
    }
    for field, (value, told) in fields.items():
        folder = write_lens(tmp_path, LENS | {field: value}, named)
        message = refusal(partial(load_model, folder), field)
        assert field in message and told in message and len(message.split("\n")) == 1, message

    local = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)
    strange = {
        "blocks.0.attn.rotary_sin": "rotary", "blocks.1.mlp.W_gate": "gated",
        "blocks.0.mlp.ln.w": "SoLU", "blocks.0.attn._W_K": "share",
        "blocks.0.ln1_post.w": "post-LN", "blocks.0.norm1.w": "SoLU", "blocks.0.attn.mask": "local",
    }
    for name, told in strange.items():
        folder = write_lens(tmp_path, LENS, named | {name: local})
        message = refusal(partial(load_model, folder), name)
        assert name in message and told in message, message
    without = {name: tensor for name, tensor in named.items() if name != "ln_final.b"}
    assert "RMS" in refusal(lambda: load_model(write_lens(tmp_path, LENS, without)))


def test_what_a_file_does_not_say_is_asked_for_and_what_it_says_holds(tmp_path,
                                                                                monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(lens_weights(lens_config(normalization_type=None)), path)
    for told in ({}, {"activation": "gelu"}, {"norm": "none"}):
        missing = "activation" if "activation" not in told and told else "norm"
        assert f"{missing}=..." in refusal(partial(load_model, path, **told), told)
    message = refusal(lambda: load_model(path, norm="none"))
    assert "by erf: its gelu" in message and "config.json beside it" in message
    assert "silu" in refusal(lambda: load_model(path, norm="none", activation="silu"))
    told = {"activation": "relu", "norm": "none", "n_heads": 4}
    assert "n_heads=3" in refusal(lambda: load_model(path, **told))
    load_model(path, **told | {"n_heads": 3})
    folder = write_lens(tmp_path / "whole", LENS, lens_weights(LENS))
    assert "activation='relu'" in refusal(lambda: load_model(folder, activation="relu"))

    # Hugging Face's format and a run say everything
    monkeypatch.setattr(checkpoint, "load_pretrained", lambda *_, **__: (tiny_model(), None))
    tiny_model(tie_embeddings=True).save_pretrained(tmp_path / "gpt2")
    assert "norm='none'" in refusal(lambda: load_model(tmp_path / "gpt2", norm="none"))
    state = {"model": tiny_model().state_dict(), "step": 1, "optimizer": [],
             "config": asdict(Config(model=tiny_model().cfg)),
             "tokenizer": CharTokenizer().fit("abcdefghijk").state_dict()}
    checkpoint.save_checkpoint(tmp_path / "run" / "checkpoint.pt", state)
    assert "n_heads=2" in refusal(lambda: load_model(tmp_path / "run", n_heads=2))
    load_model(tmp_path / "run", n_heads=3)
    with pytest.raises(TypeError, match="n_layers"):
        load_model(path, n_layers=2)


def test_tensors_that_do_not_make_the_model_are_named(tmp_path):
    named = lens_weights(LENS)
    wide = torch.zeros(3, 12, 6)
    changes = {
        "blocks.1.attn.W_Q": (wide, "[3, 12, 6]"), "blocks.1.mlp.W_in": (None, "lacks"),
        "blocks.0.attn.W_Q": (None, "missing"), "embed.W_E": (torch.zeros(11), "d_vocab"),
        "ln_final.w": (torch.ones(12, dtype=torch.int64), "int64"),
        "blocks.0.attn.b_K": (torch.zeros(5, 3), "[5, 3]"), "unembed.W_U": (wide, "d_vocab_out"),
        "blocks.0.attn.W_R": (wide, "does not have"), "blocks.5.attn.W_Q": (wide, "layers up to 5"),
        "unembed.b_U": ([1.0], "list"), "pos_embed.W_pos": (torch.zeros(9, 13), "[9, 13]"),
    }
    for name, (value, told) in changes.items():
        changed = named | {name: value}
        if value is None:
            del changed[name]
        message = refusal(partial(load_model, write_lens(tmp_path, LENS, changed)), name)
        part = name if "layers" not in told else ""
        assert part in message and told in message and "\n" not in message, message


def test_damaged_and_hostile_files_are_refused(tmp_path):
    folder = write_lens(tmp_path / "model", LENS, lens_weights(LENS))
    path = folder / "model.pth"
    whole = path.read_bytes()
    for content in (b"", whole[:-40], whole[:600] + b"\xff" + whole[601:], b"PK" * 50):
        path.write_bytes(content)
        assert str(path) in refusal(lambda: load_model(folder))
    victim = tmp_path / "victim"
    torch.save(lens_weights(LENS) | {"more": Attack(victim)}, path)
    assert str(path) in refusal(lambda: load_model(folder)) and not victim.exists()
    torch.save({"state_dict": lens_weights(LENS), "config": argparse.Namespace(d_head=5)}, path)
    message = refusal(lambda: load_model(folder))  # as people save a model with its settings
    assert "argparse.Namespace" in message and "model.state_dict()" in message
    torch.save([1, 2], path)
    assert "list" in refusal(lambda: load_model(folder))
    torch.save({}, path)
    assert "none at all" in refusal(lambda: load_model(folder))
    torch.save({"epoch": 3}, path)
    assert "epoch" in refusal(lambda: load_model(path))

    # Which file is meant?
    path.write_bytes(whole)
    (folder / "another.pt").write_bytes(whole)
    assert "another.pt, model.pth" in refusal(lambda: load_model(folder))
    (folder / "another.pt").unlink()
    path.unlink()
    assert "there: none" in refusal(lambda: load_model(folder))
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        assert "pipe" in refusal(lambda: load_model(folder))


def test_a_checkpoint_of_a_run_leads_to_its_run(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"config": {}, "tokenizer": {}, "optimizer": [], "step": 1, "model": {}}, path)
    message = refusal(lambda: load_model(path))
    assert "file='best.pt'" in message and str(tmp_path) in message


def test_a_path_without_a_model_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for path in ("mine", tmp_path / "mine"):
        message = refusal(lambda path=path: load_model(path))
        assert f"{path} has neither" in message and "config.json" in message
    for path in ("their.pt", "mine/inner/model.pth", tmp_path / "theirs"):
        message = refusal(lambda path=path: load_model(path))
        assert f"'{path}'" in message and "nor a file or folder of that name" in message
    assert "nor a file" not in refusal(lambda: load_model("their"))


def test_a_path_that_the_system_refuses_is_a_user_error(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    longest = "a" * 5000
    assert longest[:60] in refusal(lambda: load_model(longest))
    assert longest[:60] in refusal(lambda: load_pretrained(longest))
    assert longest[:60] in refusal(lambda: GPT.from_pretrained(longest))
    monkeypatch.setattr(Path, "stat", refuse)  # a folder that one may not look into
    for load in (load_model, load_pretrained):
        message = refusal(lambda load=load: load(tmp_path / "model"))
        assert str(tmp_path) in message and os.strerror(errno.EACCES) in message


def test_the_tokenizer_beside_a_model_of_any_format_is_its_own(tmp_path):
    tokenizer = BPETokenizer().train("the cat sat on the mat", 262)
    cfg = lens_config(d_vocab=262, d_vocab_out=262)
    folder = write_lens(tmp_path / "model", cfg, lens_weights(cfg))
    checkpoint.export_pretrained(tmp_path, tiny_model(d_vocab=262), tokenizer)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(folder / name)
    for _, found in (load_pretrained(folder), load_model(folder / "model.pth")):
        assert found.encode("the cat") == tokenizer.encode("the cat")

    # Neither one of more tokens nor one by other rules is left out without a word
    write_lens(folder, LENS, lens_weights(LENS))
    assert f"{tokenizer.d_vocab} tokens" in refusal(lambda: load_model(folder))
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    message = refusal(lambda: load_model(folder))
    assert "add_prefix_space" in message and "move the tokenizer's files away" in message


def test_programs_that_need_texts_refuse_a_model_without_a_tokenizer(tmp_path):
    folder = write_lens(tmp_path, LENS, lens_weights(LENS))
    for act in (lambda: load_pretrained(folder), lambda: generate.main(["--model", str(folder)])):
        assert "tokenizer" in refusal(act)


# The published toy models: their weights are not at hand


def test_a_toy_model_is_downloaded_once_by_its_name_and_read(tmp_path, monkeypatch):
    cfg = lens_config(attn_only=True, act_fn="gelu", d_mlp=48)
    cfg["normalization"] = cfg.pop("normalization_type")
    cfg["ln_eps"] = cfg.pop("eps")
    as_read = cfg | {"normalization_type": "LN", "eps": 1e-5}
    named = lens_weights(as_read, biases=False)
    asked = []

    def fetch(address, path, *_, **__):
        asked.append(address)
        write_lens(path.parent, cfg, named, "model_final.pth")

    monkeypatch.setattr(pretrained, "download_file", fetch)
    for name in ("attn-only-2l", "NeelNanda/Attn_Only_2L512W_C4_Code"):
        model, tokenizer = load_model(name, cache_dir=tmp_path)
        check_close(model(TOKENS).detach(), lens_logits(named, as_read, TOKENS))
    hub = "https://huggingface.co/NeelNanda/Attn_Only_2L512W_C4_Code/resolve/main"
    assert asked == [f"{hub}/config.json"] and tokenizer is None
    assert formats.toy_repository("gelu-4l") == "NeelNanda/GELU_4L512W_C4_Code"


def test_toy_models_of_another_kind_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, told in (("solu-2l", "SoLU"), ("NeelNanda/SoLU_1L512W_C4_Code", "SoLU"),
                       ("attn-only-2l-demo", "shortformer"), ("redwood_attn_2l", "shortformer"),
                       ("attn-only-2l-shortformer-6b-big-lr", "shortformer")):
        message = refusal(partial(load_model, name), name)
        assert told in message and name in message and "gelu-1l" in message
    assert "attn-only-2l" in refusal(lambda: load_model("atn-only-2l"))


# Written for TransformerLens


ODD = [{}, {"tie_embeddings": True}, {"attn_bias": False}, {"unembed_bias": True}, {"n_layers": 0},
       {"positions": "none"}, {"positions": "sinusoidal"}, {"norm": "none", "activation": "relu"},
       {"attn_only": True, "norm_epsilon": 0.02}, {"d_head": 5, "d_vocab_out": 4, "d_mlp": 9},
       {"activation": "gelu_exact", "n_heads": 1}]


def test_a_model_written_for_transformer_lens_has_its_logits_there_and_here(tmp_path):
    words = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}
    for number, changes in enumerate(ODD):
        model = tiny_model(**changes)
        named = model.to_transformer_lens_state_dict()
        cfg = {"act_fn": words[model.cfg.activation], "eps": model.cfg.norm_epsilon,
               "normalization_type": "LN" if model.cfg.norm == "layernorm" else None}
        sizes = ("n_layers", "n_heads", "d_head", "attn_only")
        cfg |= {name: getattr(model.cfg, name) for name in sizes}
        wanted = lens_logits(named, cfg, TOKENS)
        check_close(model(TOKENS).detach(), wanted, changes)

        folder = tmp_path / str(number)
        model.save_transformer_lens(folder)
        again, _ = load_model(folder)
        check_close(again(TOKENS).detach(), wanted, changes)
        said = json.loads((folder / "config.json").read_text())
        assert cfg.items() <= said.items(), changes


def test_the_state_dict_has_the_names_and_shapes_that_transformer_lens_asks_for():
    # As HookedTransformer makes them, for a block and what is around it
    block = {"ln1.w": (12,), "ln1.b": (12,), "ln2.w": (12,), "ln2.b": (12,),
             "attn.W_Q": (3, 12, 5), "attn.W_K": (3, 12, 5), "attn.W_V": (3, 12, 5),
             "attn.W_O": (3, 5, 12), "attn.b_Q": (3, 5), "attn.b_K": (3, 5), "attn.b_V": (3, 5),
             "attn.b_O": (12,), "attn.mask": (9, 9), "attn.IGNORE": (), "mlp.W_in": (12, 14),
             "mlp.b_in": (14,), "mlp.W_out": (14, 12), "mlp.b_out": (12,)}
    wanted = {"embed.W_E": (11, 12), "pos_embed.W_pos": (9, 12), "ln_final.w": (12,),
              "ln_final.b": (12,), "unembed.W_U": (12, 7), "unembed.b_U": (7,)}
    wanted |= {f"blocks.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()}
    model = tiny_model(d_head=5, d_mlp=14, d_vocab_out=7, attn_bias=False)
    named = model.to_transformer_lens_state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == wanted
    assert torch.equal(named["blocks.1.attn.W_K"], model.W_K[1])
    before = model(TOKENS)
    named["embed.W_E"].mul_(1)
    assert torch.equal(model(TOKENS), before)


# Tracr: compiled weights by Haiku's names

TRACR = {"n_layers": 2, "n_heads": 3, "key_size": 5, "d_model": 8, "d_mlp": 6, "n_ctx": 9,
         "d_vocab": 11}


def tracr_arrays(shape=TRACR, seed=0):
    """{module/parameter: array} as Haiku has them."""
    draw = np.random.default_rng(seed)
    wide, d_model, d_mlp = shape["n_heads"] * shape["key_size"], shape["d_model"], shape["d_mlp"]
    sizes = {"token_embed/embeddings": (shape["d_vocab"], d_model),
             "pos_embed/embeddings": (shape["n_ctx"], d_model)}
    for layer in range(shape["n_layers"]):
        for name, rows, columns in (
                ("attn/query", d_model, wide), ("attn/key", d_model, wide),
                ("attn/value", d_model, wide), ("attn/linear", wide, d_model),
                ("mlp/linear_1", d_model, d_mlp), ("mlp/linear_2", d_mlp, d_model)):
            sizes[f"transformer/layer_{layer}/{name}/w"] = (rows, columns)
            sizes[f"transformer/layer_{layer}/{name}/b"] = (columns,)
    return {name: draw.normal(0, 0.5, size).astype(np.float32) for name, size in sizes.items()}


def tracr_stream(arrays, tokens, shape=TRACR):
    """The final stream of a compiled program with causal attention, in float64."""
    w = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def linear(x, at):
        return x @ w[f"{at}/w"] + w.get(f"{at}/b", 0)

    x = w["token_embed/embeddings"][tokens] + w["pos_embed/embeddings"][: tokens.shape[1]]
    for layer in range(shape["n_layers"]):
        at = f"transformer/layer_{layer}"
        heads = shape["n_heads"], shape["key_size"]
        q, k, v = (linear(x, f"{at}/attn/{name}").unflatten(-1, heads)
                   for name in ("query", "key", "value"))
        scores = torch.einsum("bthd,bThd->bhtT", q, k) / math.sqrt(shape["key_size"])
        weights = scores.exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        z = torch.einsum("bhtT,bThd->bthd", weights, v).flatten(2)
        x = x + linear(z, f"{at}/attn/linear")
        x = x + linear(linear(x, f"{at}/mlp/linear_1").clamp(min=0), f"{at}/mlp/linear_2")
    return x


def test_a_compiled_program_gives_its_stream_or_its_readout(tmp_path, capsys):
    path = tmp_path / "program.npz"
    shapes = [TRACR, TRACR | {"n_layers": 1, "n_heads": 1, "key_size": 1}, TRACR | {"n_layers": 0}]
    for shape in shapes:
        arrays = tracr_arrays(shape)
        stream = tracr_stream(arrays, TOKENS, shape)
        heads = {"n_heads": shape["n_heads"]} if shape["n_layers"] else {"n_heads": 1}
        np.savez(path, **arrays)
        model, tokenizer = load_model(path, **heads)
        check_close(model(TOKENS).detach(), stream, shape)
        assert tokenizer is None and model.cfg.d_vocab_out == shape["d_model"]
        readout = np.random.default_rng(1).normal(size=(shape["d_model"], 4))
        np.savez_compressed(path, **arrays, unembed=readout)
        model, _ = load_model(path, **heads)
        check_close(model(TOKENS).detach(), stream @ torch.from_numpy(readout), shape)
    said = capsys.readouterr().err
    assert "read as Tracr" in said and "causal=True" in said and "final stream" in said


def test_the_number_of_heads_is_in_the_file_or_beside_it_or_told(tmp_path):
    arrays = tracr_arrays()
    wanted = tracr_stream(arrays, TOKENS)
    path = tmp_path / "program.npz"
    more = {"residual_labels": np.array(["one", "indices:0"]), "causal": True, "num_layers": 2,
            "activation_function": "relu"}
    for setting in ({"n_heads": 3}, {"num_heads": np.array([3])}, {"key_size": 5},
                    {"num_heads": 3, "key_size": 5}):
        np.savez(path, **arrays, **setting, **more)
        check_close(load_model(path)[0](TOKENS).detach(), wanted, setting)
    np.savez(path, **{name.replace("/w", ".w"): np.asfortranarray(a.astype(">f8"))
                      for name, a in arrays.items() if not name.endswith("/b")})
    without = {name: a for name, a in arrays.items() if not name.endswith("/b")}
    (tmp_path / "config.json").write_text(json.dumps(
        {"num_heads": 3, "key_size": 5, "num_layers": 2, "causal": True, "layer_norm": False}))
    check_close(load_model(tmp_path)[0](TOKENS).detach(), tracr_stream(without, TOKENS))


def test_programs_of_another_kind_and_wrong_arrays_are_refused(tmp_path):
    path = tmp_path / "program.npz"
    arrays = tracr_arrays() | {"n_heads": np.array(3)}
    query = "transformer/layer_1/attn/query/w"
    cases = [
        ({"causal": np.array(False)}, "causal"), ({"layer_norm": np.array(True)}, "LayerNorm"),
        ({"transformer/layer_0/layer_norm/scale": np.ones(8)}, "LayerNorm"),
        ({"n_heads": None}, "n_heads="), ({"n_heads": np.array(4)}, "4 heads"),
        ({"n_heads": np.array(0)}, "heads"), ({"key_size": np.array(4)}, "3 heads of 4"),
        ({"n_heads": np.array([1, 2])}, "one whole number"), ({query: None}, query),
        ({"activation": np.array("gelu")}, "relu"), ({query: np.ones((8, 9))}, query),
        ({"w_emb": np.ones((3, 3))}, "w_emb"), ({query: np.ones((8, 15), complex)}, "complex"),
        ({"pos_embed/embeddings": np.ones(8)}, "n_ctx"), ({"unembed": np.ones(8)}, "unembed"),
        ({"unembed": np.ones((7, 2))}, "[7, 2]"),
    ]
    for changes, told in cases:
        changed = {name: a for name, a in (arrays | changes).items() if a is not None}
        np.savez(path, **changed)
        message = refusal(lambda: load_model(path), changes)
        assert told in message and "\n" not in message, message
    np.savez(path, **arrays)
    for n_heads in (3.0, 0, 4, "3"):
        assert "n_heads" in refusal(partial(load_model, path, n_heads=n_heads), n_heads)


def test_an_npz_that_lies_or_runs_code_is_refused_before_it_takes_memory(tmp_path,
                                                                               monkeypatch):
    path = tmp_path / "program.npz"
    victim = tmp_path / "victim"
    np.savez(path, **tracr_arrays(), more=np.array([Attack(victim)], dtype=object))
    assert "objects" in refusal(lambda: load_model(path, n_heads=3)) and not victim.exists()

    np.savez(path, **tracr_arrays())
    whole = path.read_bytes()
    at = whole.find(b"(11, 8)")
    damaged = (b"", whole[:-50], whole[:at] + b"(9" + whole[at + 2 :], b"PK\x05\x06" + bytes(18))
    for content in damaged:
        path.write_bytes(content)
        assert str(path) in refusal(lambda: load_model(path, n_heads=3))

    # A header that promises a terabyte, and zeros that are packed a thousand to one
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": (2**37, 8), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("token_embed/embeddings.npy", header.getvalue() + bytes(64))
    assert "with 64 bytes" in refusal(lambda: load_model(path, n_heads=3))
    monkeypatch.setattr(formats, "NPZ_SIZE", 10**6)
    np.savez_compressed(path, **{"token_embed/embeddings": np.zeros((10**6, 1))})
    assert "bytes of at most 1,000,000" in refusal(lambda: load_model(path, n_heads=3))


def test_a_stream_too_wide_for_an_identity_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"token_embed/embeddings": np.zeros((1, 6000), np.float32),
                                    "pos_embed/embeddings": np.zeros((1, 6000), np.float32)})
    assert "numbers" in refusal(lambda: load_model(tmp_path / "a.npz", n_heads=1))


def test_load_pretrained_still_reads_hugging_faces_format(tmp_path):
    model = scramble_(GPT(ModelConfig(n_layers=1, n_heads=2, d_model=8, n_ctx=9, d_vocab=11)))
    model.save_pretrained(tmp_path)
    assert formats.find_format(tmp_path).format == "Hugging Face"
    assert checkpoint.find_other_format(tmp_path) is None
    assert "vocab.json" in refusal(partial(load_pretrained, tmp_path))
