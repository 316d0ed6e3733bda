"""Published weights: read from files made here by hand, refused when broken, fetched from a server.

Hugging Face's libraries are not used. The files are written byte by byte, and the logits are
compared with those of a GPT-2 in a dozen lines, with Hugging Face's names.
"""

import hashlib
import http.server
import json
import math
import random
import resource
import socket
import struct
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import refusal, tiny_model, tiny_tokens
from test_checkpoint import Attack

import checkpoint
import generate
import pretrained
import utils
from checkpoint import load_model, load_pretrained
from model import GPT
from pretrained import pretrained_folder, read_pretrained, read_safetensors, write_safetensors
from tokenizer import BPETokenizer, load_tokenizer
from utils import NoNetwork, UserError, seeded_generator

N_LAYERS, N_HEADS, D_MODEL, N_CTX, D_VOCAB = 2, 3, 12, 9, 11
CONFIG = {"model_type": "gpt2", "n_layer": N_LAYERS, "n_head": N_HEADS, "n_embd": D_MODEL,
          "n_positions": N_CTX, "vocab_size": D_VOCAB, "activation_function": "gelu_new",
          "layer_norm_epsilon": 1e-5, "n_inner": None, "resid_pdrop": 0.1}


# A checkpoint, its files, and its logits, all by hand


def published(d_mlp=4 * D_MODEL, d_vocab=D_VOCAB, seed=0):
    """{Hugging Face's name: tensor}, all of ordinary size, LayerNorms and biases too; no head."""
    generator = seeded_generator(seed)

    def draw(*shape, around=0.0):
        return around + 0.4 * torch.randn(shape, generator=generator)

    named = {"wte.weight": draw(d_vocab, D_MODEL), "wpe.weight": draw(N_CTX, D_MODEL)}
    for h in range(N_LAYERS):
        named |= {
            f"h.{h}.ln_1.weight": draw(D_MODEL, around=1), f"h.{h}.ln_1.bias": draw(D_MODEL),
            f"h.{h}.attn.c_attn.weight": draw(D_MODEL, 3 * D_MODEL),
            f"h.{h}.attn.c_attn.bias": draw(3 * D_MODEL),
            f"h.{h}.attn.c_proj.weight": draw(D_MODEL, D_MODEL),
            f"h.{h}.attn.c_proj.bias": draw(D_MODEL),
            f"h.{h}.ln_2.weight": draw(D_MODEL, around=1), f"h.{h}.ln_2.bias": draw(D_MODEL),
            f"h.{h}.mlp.c_fc.weight": draw(D_MODEL, d_mlp), f"h.{h}.mlp.c_fc.bias": draw(d_mlp),
            f"h.{h}.mlp.c_proj.weight": draw(d_mlp, D_MODEL),
            f"h.{h}.mlp.c_proj.bias": draw(D_MODEL),
        }
    return named | {"ln_f.weight": draw(D_MODEL, around=1), "ln_f.bias": draw(D_MODEL)}


def head_of(named, seed=5):
    return 0.4 * torch.randn(named["wte.weight"].shape, generator=seeded_generator(seed))


def prefixed(named):
    return {name if name == "lm_head.weight" else f"transformer.{name}": tensor
            for name, tensor in named.items()}


def masks(n_ctx=N_CTX):
    """The constants that old files carry along."""
    ones = torch.ones(1, 1, n_ctx, n_ctx).tril()
    return {f"h.{h}.attn.{name}": value for h in range(N_LAYERS)
            for name, value in (("bias", ones), ("masked_bias", torch.tensor(-1e4)))}


def gpt2_logits(named, tokens, **changes):
    """GPT-2 from Hugging Face's names, in float64; tied unless there is an lm_head.weight. changes:
    entries of config.json that are not GPT-2's."""
    config = CONFIG | changes
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in named.items()}

    def norm(x, at):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        scale = (variance + config["layer_norm_epsilon"]).sqrt()
        return (x - mean) / scale * w[f"{at}.weight"] + w[f"{at}.bias"]

    def linear(x, at):
        return x @ w[f"{at}.weight"] + w[f"{at}.bias"]

    def act(x):
        if config["activation_function"] == "relu":
            return x.clamp(min=0)
        if config["activation_function"] == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    n = tokens.shape[1]
    d_head = D_MODEL // N_HEADS
    x = w["wte.weight"][tokens] + w["wpe.weight"][:n]
    for h in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("h."))):
        qkv = linear(norm(x, f"h.{h}.ln_1"), f"h.{h}.attn.c_attn")
        z = []
        for head in range(N_HEADS):
            q, k, v = (part[..., head * d_head : (head + 1) * d_head]
                       for part in qkv.split(D_MODEL, -1))
            scores = q @ k.transpose(1, 2)
            if config.get("scale_attn_weights", True):
                scores = scores / math.sqrt(d_head)
            if config.get("scale_attn_by_inverse_layer_idx", False):
                scores = scores / (h + 1)
            scores = scores.exp().tril()
            z.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(z, -1), f"h.{h}.attn.c_proj")
        hidden = act(linear(norm(x, f"h.{h}.ln_2"), f"h.{h}.mlp.c_fc"))
        x = x + linear(hidden, f"h.{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def raw(tensor, dtype):
    """A tensor's numbers as little-endian bytes. bfloat16 is the upper half of float32."""
    numbers = tensor.contiguous().numpy().astype("<f4")
    if dtype == "BF16":
        return (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    return numbers.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def header_and(body, header):
    """A safetensors file of a header, an object or its text, and the bytes that it describes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def safetensors(named, dtype="F32"):
    header = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in named.items():
        numbers = raw(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(numbers)]}
        body += numbers
    text = json.dumps(header).encode()
    return header_and(body, text + b" " * (-len(text) % 8))


def safetensors_of(arrays):
    """A safetensors file of {name: (the format's code, numpy array)}."""
    header = {}
    body = b""
    for name, (code, array) in arrays.items():
        header[name] = {"dtype": code, "shape": list(array.shape),
                        "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    return header_and(body, header)


def parsed(content):
    """{name: numpy array} of a safetensors file of float32, and its other entries."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    metadata = header.pop("__metadata__", None)
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end and entry["dtype"] == "F32"
        end = entry["data_offsets"][1]
    assert end == len(body) and (8 + length) % 8 == 0
    return {name: np.frombuffer(body[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
            for name, entry in header.items()}, metadata


def halves(named):
    """The names in two files, dealt out in turn."""
    names = list(named)
    return {"part-1": names[::2], "part-2": names[1::2]}


def write_folder(folder, named, form="model.safetensors", dtype="F32", **config):
    """A checkpoint folder; form: the name of its file, or `sharded` before it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    sharded, _, file = form.rpartition(" ")

    def write(path, tensors):
        if file.endswith(".bin"):
            torch.save(tensors, path)
        else:
            path.write_bytes(safetensors(tensors, dtype))

    if sharded:
        for part, names in halves(named).items():
            write(folder / part, {name: named[name] for name in names})
        places = {name: part for part, names in halves(named).items() for name in names}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{file}.index.json").write_text(json.dumps(index))
    else:
        write(folder / file, named)
    return folder


def close(ours, theirs):
    return (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def check_refusal(act, *told, case=""):
    """Fails, naming the case, unless act() raises a UserError of one line in which all of `told`
    occur; returns the line."""
    message = refusal(act, case)
    assert "\n" not in message, f"{case}: {message}"
    for part in told:
        assert str(part) in message, f"{case}: {part} is not in: {message}"
    return message


# What is read


FORMS = ["model.safetensors", "sharded model.safetensors", "pytorch_model.bin",
         "sharded pytorch_model.bin"]


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_gpt_2_s_for_every_format_of_weights(tmp_path, form):
    for tied in (True, False):
        for prefix in (True, False):
            named = published()
            if not tied:
                named["lm_head.weight"] = head_of(named)
            elif prefix:
                named["lm_head.weight"] = named["wte.weight"]
            expected = gpt2_logits(named, tiny_tokens())
            if prefix:
                named = prefixed(named | masks())

            case = f"{form}, {tied=}, {prefix=}"
            folder = write_folder(tmp_path / case.replace(" ", "_"), named, form,
                                  tie_word_embeddings=tied)
            model = GPT.from_pretrained(folder)
            assert close(model(tiny_tokens()), expected), case
            assert not model.training and model.cfg.dropout == 0
            assert model.cfg.tie_embeddings is tied
            assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}


def test_the_config_s_activation_width_epsilon_and_scale_of_scores_are_built(tmp_path):
    unscaled = {"scale_attn_weights": False}
    by_layer = {"scale_attn_by_inverse_layer_idx": True}
    for changes in (
        {}, {"activation_function": "relu"}, {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu"}, {"n_inner": 20}, {"layer_norm_epsilon": 0.1},
        {"n_inner": 20, "activation_function": "relu"}, unscaled, by_layer, unscaled | by_layer,
    ):
        named = published(d_mlp=changes.get("n_inner") or 4 * D_MODEL)
        model = GPT.from_pretrained(write_folder(tmp_path, named, **changes))
        assert close(model(tiny_tokens()), gpt2_logits(named, tiny_tokens(), **changes)), changes
        others = {"activation_function": "relu", "layer_norm_epsilon": 0.2, **unscaled, **by_layer}
        for other, value in others.items():
            if changes.get(other) != value:
                expected = gpt2_logits(named, tiny_tokens(), **changes | {other: value})
                assert not close(model(tiny_tokens()), expected), (changes, other)


def test_scores_that_are_scaled_in_another_way_survive_half_precision_and_leave_the_file(tmp_path):
    named = {name: tensor.half() for name, tensor in published().items()}
    folder = write_folder(tmp_path, named, "pytorch_model.bin", scale_attn_weights=False)
    before = (folder / "pytorch_model.bin").read_bytes()
    expected = gpt2_logits(named, tiny_tokens(), scale_attn_weights=False)
    assert close(GPT.from_pretrained(folder)(tiny_tokens()), expected)
    assert (folder / "pytorch_model.bin").read_bytes() == before


def test_settings_that_a_config_lacks_are_those_of_gpt_2(tmp_path):
    named = published()
    write_folder(tmp_path, named)
    kept = ("model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    (tmp_path / "config.json").write_text(json.dumps({name: CONFIG[name] for name in kept}))
    assert close(GPT.from_pretrained(tmp_path)(tiny_tokens()), gpt2_logits(named, tiny_tokens()))


def test_a_classifier_s_scores_are_the_logits_at_every_position(tmp_path):
    named = published() | {"score.weight": head_of(published())[:3]}
    model = GPT.from_pretrained(write_folder(tmp_path, prefixed(named)))
    expected = gpt2_logits(named | {"lm_head.weight": named["score.weight"]}, tiny_tokens())
    assert model.cfg.d_vocab == D_VOCAB and model.cfg.d_vocab_out == 3
    assert expected.shape[-1] == 3 and close(model(tiny_tokens()), expected)
    write_folder(tmp_path, named | {"lm_head.weight": head_of(named)})
    check_refusal(lambda: GPT.from_pretrained(tmp_path), "lm_head.weight")


def test_names_of_compiled_and_of_parallel_models_are_read(tmp_path):
    expected = gpt2_logits(published(), tiny_tokens())
    for prefix in ("module.", "module.transformer.", "_orig_mod.transformer.",
                   "module._orig_mod.transformer."):
        named = {prefix + name: tensor for name, tensor in (published() | masks()).items()}
        model = GPT.from_pretrained(write_folder(tmp_path, named, "pytorch_model.bin"))
        assert close(model(tiny_tokens()), expected), prefix


def test_doubles_and_masks_of_any_type_are_read_and_whole_numbers_are_no_weights(tmp_path):
    exact = {name: tensor.double() + 1e-9 for name, tensor in published().items()}
    for code, kind in (("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"), ("U8", "u1"),
                       ("BOOL", "u1")):
        arrays = {name: ("F64", tensor.numpy().astype("<f8")) for name, tensor in exact.items()}
        mask = np.tril(np.ones((1, 1, N_CTX, N_CTX))).astype(kind)
        arrays |= {f"h.{h}.attn.bias": (code, mask) for h in range(N_LAYERS)}
        write_folder(tmp_path, {})
        (tmp_path / "model.safetensors").write_bytes(safetensors_of(arrays))
        model = GPT.from_pretrained(tmp_path)
        assert model.W_E.dtype == torch.float32, code
        assert close(model(tiny_tokens()), gpt2_logits(exact, tiny_tokens())), code
        assert torch.equal(read_safetensors(tmp_path / "model.safetensors")["wte.weight"],
                           exact["wte.weight"]), code

        arrays["wte.weight"] = (code, np.ones((D_VOCAB, D_MODEL)).astype(kind))
        (tmp_path / "model.safetensors").write_bytes(safetensors_of(arrays))
        check_refusal(lambda: GPT.from_pretrained(tmp_path), "wte.weight", case=code)


def test_each_weight_is_found_under_our_name(tmp_path):
    named = published() | {"lm_head.weight": head_of(published())}
    model = GPT.from_pretrained(write_folder(tmp_path, named, tie_word_embeddings=False))
    heads = (D_MODEL, 3, N_HEADS, D_MODEL // N_HEADS)
    for h, block in enumerate(model.blocks):
        theirs = {name.removeprefix(f"h.{h}."): named[name] for name in named
                  if name.startswith(f"h.{h}.")}
        for i, ours in enumerate((block.attn.W_Q, block.attn.W_K, block.attn.W_V)):
            split = theirs["attn.c_attn.weight"].reshape(heads)[:, i].transpose(0, 1)
            assert torch.equal(ours, split)
        for i, ours in enumerate((block.attn.b_Q, block.attn.b_K, block.attn.b_V)):
            assert torch.equal(ours, theirs["attn.c_attn.bias"].reshape(heads[1:])[i])
        merged = theirs["attn.c_proj.weight"].reshape(N_HEADS, D_MODEL // N_HEADS, D_MODEL)
        assert torch.equal(block.attn.W_O, merged)
        assert torch.equal(block.attn.b_O, theirs["attn.c_proj.bias"])
        assert torch.equal(block.mlp.W_in, theirs["mlp.c_fc.weight"])
        assert torch.equal(block.mlp.b_in, theirs["mlp.c_fc.bias"])
        assert torch.equal(block.mlp.W_out, theirs["mlp.c_proj.weight"])
        assert torch.equal(block.mlp.b_out, theirs["mlp.c_proj.bias"])
        for ours, ln in ((block.ln1, "ln_1"), (block.ln2, "ln_2")):
            assert torch.equal(ours.w, theirs[f"{ln}.weight"])
            assert torch.equal(ours.b, theirs[f"{ln}.bias"])
    assert torch.equal(model.W_E, named["wte.weight"])
    assert torch.equal(model.W_pos, named["wpe.weight"])
    assert torch.equal(model.ln_final.w, named["ln_f.weight"])
    assert torch.equal(model.ln_final.b, named["ln_f.bias"])
    assert torch.equal(model.W_U, named["lm_head.weight"].T)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_each_number_is_read_to_the_bit(tmp_path, dtype):
    tensors = published() | {"scalar": torch.tensor(-2.5), "empty": torch.zeros(0, 3)}
    (tmp_path / "x").write_bytes(safetensors(tensors, dtype))
    found = read_safetensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for name, tensor in tensors.items():
        assert found[name].dtype == kind and found[name].shape == tensor.shape
        bits = (raw(tensor, dtype), "<u4" if dtype == "F32" else "<u2")
        expected = np.frombuffer(*bits).astype("<u4") << (16 if dtype == "BF16" else 0)
        value = (np.frombuffer(bits[0], "<f2").astype("<f4") if dtype == "F16"
                 else expected.astype("<u4").view("<f4"))
        assert found[name].float().flatten().tolist() == value.tolist()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves_become_float32_logits(tmp_path, dtype):
    named = published()
    model = GPT.from_pretrained(write_folder(tmp_path, named, dtype=dtype))
    kind = torch.float16 if dtype == "F16" else torch.bfloat16
    cut = {name: tensor.to(kind) if dtype == "F16"  # BF16 above drops the lower half
           else (tensor.view(torch.int32) >> 16 << 16).view(torch.float32)
           for name, tensor in named.items()}
    assert model(tiny_tokens()).dtype == torch.float32
    assert close(model(tiny_tokens()), gpt2_logits(cut, tiny_tokens()))


def test_numbers_that_are_not_aligned_are_read_correctly(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for shift in range(4):
        path = tmp_path / str(shift)
        path.write_bytes(header_and(raw(values, "F32"), header + b" " * shift))
        assert torch.equal(read_safetensors(path)["a"], values), f"{shift} bytes further on"


def test_tensors_lie_where_the_header_says_in_any_order(tmp_path):
    header = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
              "none": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
              "a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    (tmp_path / "x").write_bytes(header_and(struct.pack("<eef", 1, 2, 3), header))
    found = {name: tensor.tolist() for name, tensor in read_safetensors(tmp_path / "x").items()}
    assert found == {"a": [1, 2], "b": [3], "none": []}


def test_writing_to_the_tensors_does_not_change_the_file(tmp_path):
    path = write_folder(tmp_path, published()) / "model.safetensors"
    before = path.read_bytes()
    with torch.no_grad():
        for tensor in read_pretrained(tmp_path)[1].values():
            tensor.zero_()
        GPT.from_pretrained(tmp_path).W_E.zero_()
    assert path.read_bytes() == before


def test_safetensors_come_before_a_bin_file_beside_them(tmp_path):
    right = published(seed=0)
    wrong = published(seed=1)
    for form in FORMS[1:]:
        write_folder(tmp_path, wrong, form)
    write_folder(tmp_path, right)
    assert torch.equal(GPT.from_pretrained(tmp_path).W_E, right["wte.weight"])


def test_a_bin_file_in_pytorch_s_old_format_is_read(tmp_path):
    """The hub's pytorch_model.bin of GPT-2 is from 2019, before PyTorch's files were zip files."""
    write_folder(tmp_path, {}, "pytorch_model.bin")
    torch.save(published(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    logits = GPT.from_pretrained(tmp_path)(tiny_tokens())
    assert close(logits, gpt2_logits(published(), tiny_tokens()))


# What is written


def test_a_model_comes_back_bit_for_bit(tmp_path):
    for changes in ({}, {"tie_embeddings": True}, {"activation": "relu", "d_mlp": 20},
                    {"n_layers": 0}, {"dropout": 0.3},
                    {"activation": "gelu_exact", "norm_epsilon": 0.1}):
        model = tiny_model(**changes)
        model.save_pretrained(tmp_path)
        again = GPT.from_pretrained(tmp_path)
        assert torch.equal(again(tiny_tokens()), model(tiny_tokens())), changes
        weights = again.state_dict()
        assert weights.keys() == model.state_dict().keys(), changes
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items()), changes


def test_a_model_with_less_than_gpt_2_has_comes_back_with_its_logits(tmp_path):
    for changes in ({"attn_bias": False}, {"positions": "sinusoidal"}, {"positions": "none"},
                    {"attn_bias": False, "positions": "none", "tie_embeddings": True}):
        model = tiny_model(**changes)
        model.save_pretrained(tmp_path)
        logits = GPT.from_pretrained(tmp_path)(tiny_tokens())
        assert close(logits, model(tiny_tokens()).double()), changes
        assert close(logits, gpt2_logits(model.to_hf_state_dict(), tiny_tokens())), changes


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_written_are_gpt_2_s_and_mean_the_same(tied):
    model = tiny_model(tie_embeddings=tied)
    named = model.to_hf_state_dict()
    assert set(named) == {*prefixed(published()), "lm_head.weight"}
    shapes = prefixed(published()) | {"lm_head.weight": published()["wte.weight"]}
    assert all(named[name].shape == shapes[name].shape for name in named)
    assert close(model(tiny_tokens()), gpt2_logits(named, tiny_tokens()))


@pytest.mark.parametrize("tied", [True, False])
def test_another_reader_gets_the_same_from_the_written_file(tmp_path, tied):
    model = tiny_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path / "new/folder")
    arrays, metadata = parsed((tmp_path / "new/folder/model.safetensors").read_bytes())
    named = model.to_hf_state_dict()
    assert metadata.keys() == {"format", "content_sha256"} and metadata["format"] == "pt"
    assert ("lm_head.weight" in arrays) is not tied
    assert arrays.keys() | {"lm_head.weight"} == named.keys()
    assert all((arrays[name] == named[name].detach().numpy()).all() for name in arrays)
    config = json.loads((tmp_path / "new/folder/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["n_inner"] == 48
    names = CONFIG.keys() - {"n_inner", "resid_pdrop"}
    assert {name: config[name] for name in names} == {name: CONFIG[name] for name in names}
    assert config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_tensors_come_back_from_a_file_of_ours(tmp_path, dtype):
    draw = torch.randn(3, 5, generator=seeded_generator(0)).to(dtype)
    tensors = {"a": draw, "turned": draw.T, "one": draw[0, 0], "none": draw[:0], "é": draw[::2, 1:]}
    write_safetensors(tmp_path / "x", tensors)
    found = read_safetensors(tmp_path / "x")
    assert list(found) == list(tensors)
    assert all(found[name].dtype == dtype and torch.equal(found[name], tensors[name])
               for name in tensors)


def test_a_model_that_gpt_2_s_format_cannot_hold_is_refused(tmp_path):
    for changes, told in [
        ({"attn_only": True}, "attn_only=True"), ({"norm": "none"}, "norm='none'"),
        ({"unembed_bias": True}, "unembed_bias=True"), ({"d_head": 5}, "d_head=5"),
        ({"d_vocab_out": 4}, "d_vocab_out=4"),
    ]:
        model = tiny_model(**changes)
        check_refusal(model.to_hf_state_dict, told, case=told)
        check_refusal(partial(model.save_pretrained, tmp_path / "new"), told, case=told)
        assert not (tmp_path / "new").exists()


def test_a_model_of_doubles_is_refused_in_one_line(tmp_path):
    model = tiny_model(dtype=torch.float64)
    check_refusal(lambda: model.save_pretrained(tmp_path), "float64")


# Broken files


A = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
BAD_HEADERS = {  # text of the header, bytes after it, what is told
    "not JSON": ("{nonsense", 8, "not a whole"),
    "nothing": ("", 8, "not a whole"),
    "not UTF-8": (b"\xff\xfe{}", 8, "not a whole"),
    "a list": (f"[{{{A}}}]", 8, "not an object"),
    "nested without end": ("[" * 100_000, 8, "not a whole"),
    "an entry that is a number": ('{"a": 3}', 8, "a has dtype 3"),
    "no dtype": ('{"a": {"shape": [2], "data_offsets": [0, 8]}}', 8, "a has dtype None"),
    "unknown dtype": (A.replace("F32", "F8_E4M3"), 8, "'F8_E4M3', not one of F32, F16, BF16"),
    "dtype in lower case": (A.replace("F32", "f32"), 8, "'f32'"),
    "dtype that is a list": (A.replace('"F32"', "[1]"), 8, "a has dtype [1]"),
    "no shape": ('{"a": {"dtype": "F32", "data_offsets": [0, 8]}}', 8, "a has shape None"),
    "shape that is a number": (A.replace("[2]", "2"), 8, "a has shape 2"),
    "negative shape": (A.replace("[2]", "[-2]"), 8, "a has shape [-2]"),
    "two negatives in a shape": (A.replace("[2]", "[-1, -2]"), 8, "a has shape [-1, -2]"),
    "shape of floats": (A.replace("[2]", "[2.0]"), 8, "a has shape [2.0]"),
    "shape of booleans": (A.replace("[2]", "[true, 2]"), 8, "a has shape [True, 2]"),
    "shape of text": (A.replace("[2]", '["2"]'), 8, "a has shape ['2']"),
    "shape beyond all memory": (A.replace("[2]", f"[{2**70}]"), 8, f"a has shape [{2**70}]"),
    "shape beyond all numbers, of nothing":
        (A.replace("[2]", f"[{2**70}, 0]").replace("8]", "0]"), 0, "a"),
    "strides beyond all numbers, of nothing":
        (A.replace("[2]", f"[0, {2**47}, {2**47}]").replace("8]", "0]"), 0, "overflow"),
    "no offsets": ('{"a": {"dtype": "F32", "shape": [2]}}', 8, "a has data_offsets None"),
    "one offset": (A.replace("[0, 8]", "[8]"), 8, "a has data_offsets [8]"),
    "three offsets": (A.replace("[0, 8]", "[0, 8, 8]"), 8, "a has data_offsets [0, 8, 8]"),
    "no offset": (A.replace("[0, 8]", "[]"), 8, "a has data_offsets []"),
    "offsets of floats": (A.replace("[0, 8]", "[0, 8.0]"), 8, "data_offsets [0, 8.0]"),
    "offsets of booleans": (A.replace("[0, 8]", "[false, 8]"), 8, "data_offsets [False, 8]"),
    "negative offsets": (A.replace("[0, 8]", "[-8, 0]"), 8, "data_offsets [-8, 0]"),
    "reversed offsets": (A.replace("[0, 8]", "[8, 0]"), 8, "offsets 8 to 0 of 8"),
    "fewer bytes than the shape": (A.replace("[2]", "[3]"), 8, "a, 12 bytes, has offsets"),
    "more bytes than the shape": (A.replace("[2]", "[1]"), 8, "a, 4 bytes, has offsets"),
    "bytes of another dtype": (A.replace("F32", "BF16"), 8, "a, 4 bytes, has offsets"),
    "beyond the end": (A, 4, "offsets 0 to 8 of 4"),
    "nothing after the header": (A, 0, "offsets 0 to 8 of 0"),
    "not from the start": (A.replace("[0, 8]", "[4, 12]"), 12, "12 of 12; they must begin at 0"),
    "an overlap": (f'{{{A}, {A.replace(chr(97), "b", 1).replace("[0, 8]", "[4, 12]")}}}', 12,
                   "b, 8 bytes, has offsets 4 to 12 of 12; they must begin at 8"),
    "the same place twice": (f'{{{A}, "b": {A[5:]}}}', 8, "b, 8 bytes"),
    "a gap": (f'{{{A}, "b": {A[5:].replace("[0, 8]", "[12, 20]")}}}', 20, "must begin at 8"),
    "bytes at the end": (A, 12, "4 bytes belong to no tensor"),
    "no tensor for the bytes": ("{}", 8, "8 bytes belong to no tensor"),
    "a name twice": (f"{{{A}, {A}}}", 8, "a name occurs twice"),
    "a field twice": (A.replace('"dtype"', '"dtype": "F32", "dtype"'), 8, "a name occurs twice"),
}


def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path):
    path = tmp_path / "x"
    for case, (text, n_bytes, told) in BAD_HEADERS.items():
        text = f"{{{text}}}" if str(text).startswith('"a"') else text
        text = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(header_and(bytes(n_bytes), text))
        check_refusal(lambda: read_safetensors(path), path, told, case=case)


def test_the_header_that_the_bad_ones_are_made_from_is_good(tmp_path):
    (tmp_path / "x").write_bytes(header_and(struct.pack("<ff", 1, 2), f"{{{A}}}".encode()))
    assert read_safetensors(tmp_path / "x")["a"].tolist() == [1, 2]


def test_a_file_without_a_whole_header_is_refused(tmp_path):
    path = tmp_path / "x"
    for content, told in [
        (b"", "is empty"), (b"\x01", "a header of 1 bytes in a file of 1"),
        (bytes(7), "in a file of 7"), (bytes(8), "Expecting"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
        (b"\xff" * 8 + b"{}", f"{2**64 - 1:,} bytes in a file of 10"),
        (b"<!DOCTYPE html><html>not found</html>", "in a file of 37"),
    ]:
        path.write_bytes(content)
        check_refusal(lambda: read_safetensors(path), path, told, case=content)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = safetensors({"a": torch.arange(3.0), "b": torch.arange(2.0)})
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        check_refusal(lambda: read_safetensors(tmp_path / "x"), tmp_path / "x", case=length)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    check_refusal(lambda: read_safetensors(tmp_path / "x"), "cannot read", "No such file")
    check_refusal(lambda: read_safetensors(tmp_path), "cannot read", "Is a directory")


def test_a_bin_file_without_weights_is_refused(tmp_path):
    path = write_folder(tmp_path, {}, "pytorch_model.bin") / "pytorch_model.bin"
    for content in (b"", b"hello", [torch.ones(2)], {"wte.weight": 3}, torch.ones(2),
                    {0: torch.ones(2)}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        check_refusal(lambda: read_pretrained(tmp_path), path, case=content)


def test_a_bin_file_that_asks_to_run_code_is_refused_before_it_runs(tmp_path):
    write_folder(tmp_path, {}, "pytorch_model.bin")
    torch.save(Attack(tmp_path / "victim"), tmp_path / "pytorch_model.bin")
    check_refusal(lambda: read_pretrained(tmp_path), tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "victim").exists()


def test_an_index_that_names_missing_tensors_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(safetensors(published()))
    folder = write_folder(tmp_path / "f", published(), "sharded model.safetensors")
    below = folder / "below"
    below.mkdir()
    (below / "x").write_bytes(safetensors(published()))
    for index, told in [
        ("{", "download it again"), ("[]", "not a JSON object"), ("{}", "weight_map"),
        ({"weight_map": None}, "weight_map"), ({"weight_map": ["part-1"]}, "weight_map"),
        ({"weight_map": {"wte.weight": "../x"}}, "weight_map"),
        ({"weight_map": {"wte.weight": str(tmp_path / "x")}}, "weight_map"),
        ({"weight_map": {"wte.weight": "below/x"}}, "weight_map"),
        ({"weight_map": {"wte.weight": 3}}, "weight_map"),
        ({"weight_map": {"wte.weight": ".."}}, ""), ({"weight_map": {"wte.weight": ""}}, ""),
        ({"weight_map": {"wte.weight": "part-3"}}, "part-3"),
        ({"weight_map": {"wte.weight": "part-2", "more": "part-1", "wpe.weight": "part-2"}},
         "wte.weight, more"),
    ]:
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / "model.safetensors.index.json").write_text(text)
        check_refusal(lambda: read_pretrained(folder), folder, told, case=text)


# Another architecture


def test_all_missing_and_all_unknown_tensors_are_named(tmp_path):
    named = published()
    lost = ["h.0.ln_1.bias", "h.1.mlp.c_fc.weight", "ln_f.weight", "wpe.weight", "wte.weight"]
    kept = {name: tensor for name, tensor in named.items() if name not in lost}
    strange = ["h.0.attn.rotary", "h.2.ln_1.bias", "score.weight"]
    write_folder(tmp_path, prefixed(kept | {name: torch.ones(2) for name in strange}))
    message = check_refusal(lambda: GPT.from_pretrained(tmp_path), tmp_path)
    assert f"lacks: {', '.join(lost)}; " in message
    assert message.endswith(f"not GPT-2's: {', '.join(strange)}")


def test_one_tensor_too_many_or_too_few_is_enough(tmp_path):
    named = published()
    write_folder(tmp_path, named | {"h.2.ln_1.bias": torch.ones(D_MODEL)})
    told = "has tensors that are not GPT-2's: h.2.ln_1.bias"
    assert check_refusal(lambda: GPT.from_pretrained(tmp_path)) == f"{tmp_path} {told}"
    write_folder(tmp_path, {name: named[name] for name in named if name != "h.1.ln_2.bias"})
    told = "lacks: h.1.ln_2.bias"
    assert check_refusal(lambda: GPT.from_pretrained(tmp_path)) == f"{tmp_path} {told}"


def test_a_folder_without_tensors_lacks_them_all(tmp_path):
    write_folder(tmp_path, {})
    check_refusal(lambda: GPT.from_pretrained(tmp_path), f"lacks: {', '.join(sorted(published()))}")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    for name, tensor in published().items():
        longer = torch.cat([tensor, tensor[:1]])
        write_folder(tmp_path, published() | {name: longer})
        shape = list(longer.shape)
        check_refusal(lambda: GPT.from_pretrained(tmp_path), tmp_path, shape, case=name)


def test_matrices_laid_out_the_other_way_are_refused(tmp_path):
    named = published()
    named["h.0.mlp.c_fc.weight"] = named["h.0.mlp.c_fc.weight"].T
    write_folder(tmp_path, named)
    check_refusal(lambda: GPT.from_pretrained(tmp_path), "[48, 12] instead of [12, 48]")


def test_a_head_that_is_missing_or_contradicts_the_config_is_refused(tmp_path):
    named = published()
    write_folder(tmp_path, named, tie_word_embeddings=False)
    check_refusal(lambda: GPT.from_pretrained(tmp_path), "lacks: lm_head.weight")
    for head in (head_of(named), named["wte.weight"][:-1]):
        write_folder(tmp_path, named | {"lm_head.weight": head})
        check_refusal(lambda: GPT.from_pretrained(tmp_path), '"tie_word_embeddings": false')


def test_a_config_of_another_architecture_is_refused(tmp_path):
    for changes, *told in [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"activation_function": "silu"}, "'silu'", "gelu_new, gelu_pytorch_tanh, gelu, gelu_fast"),
        ({"activation_function": None}, "activation_function=None"),
        ({"activation_function": []}, "activation_function=[]"),
        *[({"layer_norm_epsilon": value}, f"layer_norm_epsilon={value!r}", "number")
          for value in (-1e-6, 2.0, "1e-5", None, True, float("nan"), 10**20)],
        *[({name: value}, f"{name}={value!r}", "true or false")
          for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
          for value in (1, None, "false")],
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_layer": None, "n_embd": "12", "vocab_size": 11.0}, "n_layer, n_embd, vocab_size"),
        ({"n_head": 5}, "n_heads=5", "d_model=12", "config.json: "),
        ({"n_head": 0}, "n_heads=0"), ({"n_layer": -1}, "n_layers=-1"),
        ({"n_inner": 0}, "d_mlp=0"), ({"n_positions": 0}, "n_ctx=0"),
        ({"n_inner": "48"}, "n_inner='48'"),
    ]:
        write_folder(tmp_path, published(), **changes)
        check_refusal(lambda: GPT.from_pretrained(tmp_path), *told, case=changes)


def test_a_config_of_a_larger_model_than_its_weights_takes_neither_time_nor_memory(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, before[1]))
    try:
        for form in FORMS[::2]:
            for name in ("n_layer", "n_embd", "n_inner", "n_positions", "vocab_size", "n_head"):
                for size in (10**5, 10**6, 10**9, 10**12, 10**30, 2**63, 10**4000):
                    case = f"{form}: {name}={str(size)[:40]}"
                    folder = write_folder(tmp_path / form, published(), form, **{name: size})
                    start = time.perf_counter()
                    message = check_refusal(partial(GPT.from_pretrained, folder), case=case)
                    assert len(message) < 2000, case
                    assert time.perf_counter() - start < 2, f"{case} takes long to refuse"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_foreign_text_in_a_message_is_short_and_printable(tmp_path):
    nasty = "\x1b[31mred\n\u202e" + "long " * 10_000
    for changes in ({"model_type": nasty}, {"activation_function": nasty}, {"n_inner": nasty},
                    {"layer_norm_epsilon": nasty}, {"tie_word_embeddings": nasty}):
        write_folder(tmp_path, published(), **changes)
        message = check_refusal(lambda: GPT.from_pretrained(tmp_path), case=list(changes))
        assert message.isprintable() and len(message) < 1000, list(changes)
    write_folder(tmp_path, published() | {f"{n}{nasty[:999]}": torch.ones(1) for n in range(500)})
    message = check_refusal(lambda: GPT.from_pretrained(tmp_path), "492 more")
    assert message.isprintable() and len(message) < 1000


def test_weights_under_two_names_are_refused(tmp_path):
    named = published()
    twice = named | {"transformer.wte.weight": named["wte.weight"] + 1}
    for form in FORMS:
        write_folder(tmp_path / form, twice, form)
        check_refusal(partial(GPT.from_pretrained, tmp_path / form), "wte.weight twice", case=form)


def test_no_bit_of_a_file_of_ours_can_flip_and_give_other_weights(tmp_path):
    model = tiny_model(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    draw = random.Random(0)
    for place in [*range(0, 400, 7), *(draw.randrange(len(whole)) for _ in range(200))]:
        raw = bytearray(whole)
        raw[place] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        try:
            again = GPT.from_pretrained(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:  # the rest of the metadata, where only a checksum that has lost its name is none
            assert torch.equal(again(tiny_tokens()), model(tiny_tokens())), f"byte {place}"


def test_a_flipped_bit_of_a_bin_file_is_noticed(tmp_path):
    named = published()
    path = write_folder(tmp_path, named, "pytorch_model.bin") / "pytorch_model.bin"
    raw = bytearray(path.read_bytes())
    raw[raw.find(named["wte.weight"].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(raw)
    check_refusal(lambda: GPT.from_pretrained(tmp_path), path, "checksum")


def test_a_header_of_millions_of_entries_is_refused_before_it_is_read(tmp_path):
    entry = b'"a%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % n for n in range(300_000)) + b"}"
    (tmp_path / "x").write_bytes(header_and(b"", header))
    start = time.perf_counter()
    check_refusal(lambda: read_safetensors(tmp_path / "x"), "a header of", "at most")
    many_axes = A.replace("[2]", "[" + "281474976710655, " * 100_000 + "2]")
    (tmp_path / "x").write_bytes(header_and(bytes(8), f"{{{many_axes}}}".encode()))
    check_refusal(lambda: read_safetensors(tmp_path / "x"), "a has shape")
    assert time.perf_counter() - start < 2


def test_a_file_that_is_not_a_config_is_refused(tmp_path):
    write_folder(tmp_path, published())
    path = tmp_path / "config.json"
    for text, told in [
        ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"), ("null", "not a JSON object"), ("{}", "no model_type"),
    ]:
        path.write_text(text)
        check_refusal(lambda: GPT.from_pretrained(tmp_path), path, told, case=text[:20])


def test_a_folder_without_config_or_weights_and_an_unknown_name_are_refused(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", "gpt3", "", "a/b/c", "../gpt2", "tests/gpt2"):
        check_refusal(partial(GPT.from_pretrained, name), repr(name),
                      "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2", case=name)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    check_refusal(lambda: GPT.from_pretrained(tmp_path), "model.safetensors", "pytorch_model.bin")
    check_refusal(lambda: read_pretrained(tmp_path / "nowhere"), tmp_path / "nowhere")


# The tokenizer beside the weights


VOCABULARY = [*BPETokenizer().state_dict()["tokens"], "he", "<|endoftext|>"]
VOCAB_JSON = json.dumps({token: i for i, token in enumerate(VOCABULARY)}).encode()
MERGES_TXT = b"#version: 0.2\nh e\n"


def tokenizer_json(**changes):
    """The same tokenizer as one object, with the fields that Hugging Face's libraries write."""
    vocab = {token: i for i, token in enumerate(VOCABULARY)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    template = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [added_token("<|endoftext|>", 257)], "pre_tokenizer": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template,
                           "special_tokens": {}},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [["h", "e"]]},
    } | changes


def added_token(content, i, **changes):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True} | changes


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_a_folder_gives_its_model_and_its_tokenizer(tmp_path, names):
    write_folder(tmp_path, published(d_vocab=258), vocab_size=258)
    for name, content in zip(names, (VOCAB_JSON, MERGES_TXT), strict=True):
        (tmp_path / name).write_bytes(content)
    for load in (load_pretrained, load_model):
        model, tokenizer = load(tmp_path)
        assert isinstance(tokenizer, BPETokenizer) and model.cfg.d_vocab == tokenizer.d_vocab == 258
        assert tokenizer.encode("he") == [256] and not model.training


def test_a_tokenizer_json_is_the_same_tokenizer_as_its_two_files(tmp_path):
    write_folder(tmp_path, published(d_vocab=260), vocab_size=260)
    (tmp_path / "vocab.json").write_bytes(VOCAB_JSON)
    (tmp_path / "merges.txt").write_bytes(MERGES_TXT)
    expected = load_model(tmp_path)[1].state_dict()
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
    model = tokenizer_json()["model"]
    older = {name: model[name] for name in ("vocab", "merges")}  # of libraries of before 2021
    for changes in ({}, {"model": model | {"merges": ["h e"]}}, {"model": older},
                    {"post_processor": {"type": "ByteLevel", "trim_offsets": False}},
                    {"added_tokens": None}, {"decoder": None, "post_processor": None},
                    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
        assert load_model(tmp_path)[1].state_dict() == expected, changes


def test_added_tokens_are_one_token_each_in_a_document_and_in_a_state(tmp_path):
    write_folder(tmp_path, published(d_vocab=270), vocab_size=270)
    added = {"<pad>": 258, "<pad>ding": 259, "é ": 260, "he": 256}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(added_tokens=[
        added_token(text, i) for text, i in ({"<|endoftext|>": 257} | added).items()])))
    _, of_json = load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    del added["he"]
    (tmp_path / "vocab.json").write_bytes(VOCAB_JSON)
    (tmp_path / "merges.txt").write_bytes(MERGES_TXT)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    _, of_files = load_model(tmp_path)
    checkpoint.export_pretrained(tmp_path / "again", tiny_model(d_vocab=270), of_json)
    _, of_export = load_model(tmp_path / "again")
    again = load_tokenizer(json.loads(json.dumps(of_json.state_dict())))
    assert checkpoint.is_tokenizer_state(of_json.state_dict())
    for tokenizer in (of_json, of_files, of_export, again):
        text = "he<pad><pad>ding<|endoftext|>é "
        assert tokenizer.encode_document(text) == [256, 258, 259, 257, 260]
        assert tokenizer.decode([256, 258, 260]) == "he<pad>é " and tokenizer.d_vocab == 261
        assert tokenizer.encode(text) == BPETokenizer().load_state_dict(
            {"kind": "bpe", "tokens": VOCABULARY, "merges": [["h", "e"]]}).encode(text)


def test_which_tokens_of_the_two_files_are_one_in_a_text_is_read_beside_them(tmp_path):
    write_folder(tmp_path, published(d_vocab=259), vocab_size=259)
    (tmp_path / "vocab.json").write_text(json.dumps(json.loads(VOCAB_JSON) | {"<s>": 258}))
    (tmp_path / "merges.txt").write_bytes(MERGES_TXT)
    settings = tmp_path / "tokenizer_config.json"
    spelled = load_model(tmp_path)[1].encode_document("<s>he")
    assert len(spelled) == 4  # as vocab.json alone is read elsewhere, too

    settings.write_text(json.dumps({"added_tokens_decoder": {"258": added_token("<s>", 258)}}))
    assert load_model(tmp_path)[1].encode_document("<s>he") == [258, 256]
    for wrong, told in [({"258": added_token("<s>", 258, lstrip=True)}, "lstrip=true"),
                        ({"257": {"content": "<s>"}}, "two ids"),
                        ({"x": {"content": "<s>"}}, "'x'"),
                        ([258], "added_tokens_decoder"), ({"258": "<s>"}, "added_tokens_decoder")]:
        settings.write_text(json.dumps({"added_tokens_decoder": wrong}))
        check_refusal(lambda: load_model(tmp_path), told, case=wrong)

    # A tokenizer.json is read instead of the two files
    settings.unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(added_tokens=[
        added_token("<|endoftext|>", 257), added_token("<s>", 258)])))
    assert load_model(tmp_path)[1].encode_document("<s>he") == [258, 256]


def test_a_tokenizer_json_by_other_rules_is_refused_by_what_differs(tmp_path):
    write_folder(tmp_path, published(d_vocab=258), vocab_size=258)
    good = tokenizer_json()
    model, byte_level = good["model"], good["pre_tokenizer"]
    end = added_token("<|endoftext|>", 257)
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *good["post_processor"]["single"]]
    for changes, told in [
        ({"model": model | {"type": "WordPiece"}}, "model.type='WordPiece'"),
        ({"model": model | {"dropout": 0.1}}, "model.dropout=0.1"),
        ({"model": model | {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix='##'"),
        ({"model": model | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix='</w>'"),
        ({"model": model | {"ignore_merges": True}}, "ignore_merges=True"),
        ({"normalizer": {"type": "NFC"}}, "normalizer.type='NFC'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.type='Whitespace'"),
        ({"pre_tokenizer": None}, "pre_tokenizer.type=None"),
        ({"pre_tokenizer": byte_level | {"add_prefix_space": True}}, "add_prefix_space=True"),
        ({"pre_tokenizer": byte_level | {"use_regex": False}}, "use_regex=False"),
        ({"pre_tokenizer": "ByteLevel"}, "pre_tokenizer"), ({"decoder": [1]}, "decoder"),
        ({"decoder": {"type": "Metaspace"}}, "decoder.type='Metaspace'"),
        ({"post_processor": {"type": "BertProcessing"}}, "'BertProcessing'"),
        ({"post_processor": good["post_processor"] | {"single": template}}, "post_processor puts"),
        ({"post_processor": {"type": "TemplateProcessing", "single": 3}}, "not a tokenizer's"),
        ({"added_tokens": [end | {"lstrip": True}]}, "lstrip=true"),
        ({"added_tokens": [end | {"single_word": True}]}, "single_word=true"),
        ({"added_tokens": [end, added_token("<pad>", 257)]}, "not 0, 1, 2"),
        ({"added_tokens": [added_token("<|endoftext|>", 256)]}, "two ids"),
        ({"added_tokens": [end, added_token(" ", 258)]}, "two ids"),
        ({"added_tokens": [end, added_token("<pad>", 300)]}, "not 0, 1, 2"),
        ({"added_tokens": [end, added_token("<pad>", "258")]}, "not a tokenizer's"),
        ({"added_tokens": [end, added_token(3, 258)]}, "not a tokenizer's"),
        ({"added_tokens": [end, added_token("\ud800", 258)]}, "not a tokenizer's"),
        ({"added_tokens": 3}, "not a tokenizer's"), ({"added_tokens": [3]}, "not a tokenizer's"),
        ({"added_tokens": [{}]}, "not a tokenizer's"), ({"model": None}, "not a tokenizer's"),
        ({"model": model | {"merges": 3}}, "not a tokenizer's"),
        ({"model": model | {"merges": [["h", 3]]}}, "not a tokenizer's"),
        ({"model": model | {"merges": [["h"]]}}, "not a pair"),
        ({"model": model | {"merges": ["h e e"]}}, "not a pair"),
        ({"model": model | {"merges": [["e", "h"]]}}, "b'eh'"),
        ({"model": model | {"vocab": ["a"]}}, "not a tokenizer's"),
        ({"model": model | {"vocab": {"a": 0}}}, ""),
        ({"model": model | {"vocab": model["vocab"] | {"a b": 258}}}, "'a b'"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
        check_refusal(lambda: load_model(tmp_path), told, case=changes)
    for text in ("", "[]", "{", "{}", '{"model": '):
        (tmp_path / "tokenizer.json").write_text(text)
        check_refusal(lambda: load_model(tmp_path), "tokenizer.json", case=text)


def test_settings_beside_the_two_files_that_give_other_ids_are_refused(tmp_path):
    write_folder(tmp_path, published(d_vocab=258), vocab_size=258)
    (tmp_path / "vocab.json").write_bytes(VOCAB_JSON)
    (tmp_path / "merges.txt").write_bytes(MERGES_TXT)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"add_prefix_space": false, "add_bos_token": false}')
    assert load_model(tmp_path)[1].encode("he") == [256]
    for name in ("add_prefix_space", "add_bos_token"):
        settings.write_text(json.dumps({name: True}))
        check_refusal(lambda: load_model(tmp_path), f"{name}=true", settings, case=name)


def test_a_folder_without_a_tokenizer_or_with_one_of_more_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "GPT2_BPE", tmp_path / "gpt2_bpe")
    folder = write_folder(tmp_path / "mine", published())
    told = (folder, "vocab.json", "merges.txt", "tokenizer.json", "load_model")
    check_refusal(lambda: load_pretrained(folder), *told)
    (folder / "vocab.json").write_bytes(VOCAB_JSON)
    check_refusal(lambda: load_pretrained(folder), *told)
    assert load_model(folder)[1] is None
    (folder / "merges.txt").write_bytes(MERGES_TXT)
    check_refusal(lambda: load_model(folder), "258 tokens", "11")
    write_folder(folder, published(d_vocab=258), vocab_size=258)
    assert load_model(folder)[1].encode("he") == [256]


# Downloads


PREFIX = "/openai-community/gpt2/resolve/main/"
WEIGHTS = "/cdn/weights"


class Hub(http.server.BaseHTTPRequestHandler):
    """Small files with git's SHA-1 as their tag; the weights behind a redirect that has SHA-256."""

    def do_GET(self):
        hub = self.server.hub
        asked = self.headers.get("Range")
        name, _, file = self.path.removeprefix("/").partition("/resolve/main/")
        hub.requested.append((file or self.path, asked))
        status = hub.statuses.pop(0) if hub.statuses and self.path == WEIGHTS else None
        if status:
            self.answer(status, b"no", {})
        elif file and name != hub.name:
            self.answer(401, b"Repository not found", {})
        elif file and file not in hub.files:
            self.answer(404, b"Entry not found", {})
        elif file == "model.safetensors":
            tag = hub.tag or hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
            place = {"Location": WEIGHTS, "X-Linked-ETag": f'"{tag}"', "ETag": '"' + "0" * 40 + '"'}
            self.answer(302, b"moved to another place", place)
        elif self.path == WEIGHTS:  # its own tag is no checksum of the file
            self.send_file(hub.files["model.safetensors"], {"ETag": '"' + "1" * 64 + '"'}, asked)
        else:
            content = hub.files[file]
            tag = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
            self.send_file(content, {"ETag": f'{hub.weak}"{hub.small_tag or tag}"'}, asked)

    def send_file(self, content, headers, asked):
        hub = self.server.hub
        start = 0
        if asked and hub.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.answer(416, b"beyond", {"Content-Range": f"bytes */{len(content)}"})
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        cut = hub.cuts.pop(0) if hub.cuts and self.path == WEIGHTS else None
        if cut != 0:  # else it hangs up without a word
            self.answer(206 if start else 200, content[start:], headers, cut)

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine with one small GPT-2, and a home of its own.

    cuts: after how many bytes it hangs up, answer by answer; statuses: what it answers in place of
    the weights; tag: a wrong checksum.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(pretrained, "HUB", f"http://127.0.0.1:{server.server_port}")
    config = json.dumps(CONFIG | {"vocab_size": 258}).encode()
    weights = safetensors(prefixed(published(d_vocab=258)) | masks(256))  # several pieces
    server.hub = SimpleNamespace(
        name="openai-community/gpt2", requested=[], cuts=[], statuses=[], ranges=True, tag=None,
        small_tag=None, weak="",
        files={"config.json": config, "vocab.json": VOCAB_JSON, "merges.txt": MERGES_TXT,
               "model.safetensors": weights})
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()


def of_weights(hub):
    """The requested ranges of the weights; None is a request for all of them."""
    return [asked for path, asked in hub.requested if path == WEIGHTS]


def went_on(asked, stops):
    """Whether each request but the first asked for what is missing after a stop; of what came in
    the last piece before it, up to 64 KiB, nothing need be kept."""
    starts = [int(ranges.removeprefix("bytes=").removesuffix("-")) for ranges in asked[1:]]
    came = [start + sent for start, sent in zip([0, *starts], stops, strict=False)]
    return asked[0] is None and len(starts) == len(stops) and all(
        stop - 2**16 < start <= stop for start, stop in zip(starts, came, strict=True))


def address_of_gpt2():
    return pretrained.HUB + PREFIX.removesuffix("/")


def part_of(folder):
    return folder / "gpt2/model.safetensors.part"


def all_there(hub, folder):
    """Whether the files are the hub's, and nothing else lies there."""
    found = {path.name: path.read_bytes() for path in (folder / "gpt2").iterdir()}
    return found == hub.files


def test_a_model_is_downloaded_once_into_the_folder_given(hub, tmp_path):
    model = GPT.from_pretrained("gpt2", tmp_path / "new/cache")
    expected = gpt2_logits(published(d_vocab=258), tiny_tokens())
    assert close(model(tiny_tokens()), expected)
    assert all_there(hub, tmp_path / "new/cache")
    asked = len(hub.requested)
    assert asked == 5 and {ranges for _, ranges in hub.requested} == {None}
    model, tokenizer = load_model("gpt2", cache_dir=tmp_path / "new/cache")
    assert len(hub.requested) == asked
    assert close(model(tiny_tokens()), expected) and tokenizer.encode("he") == [256]


def test_without_a_folder_downloads_go_below_the_home(hub, tmp_path):
    cache = tmp_path / "home/.cache/gpt2-from-scratch"
    assert pretrained_folder("gpt2") == cache / "gpt2" and all_there(hub, cache)


def test_the_program_downloads_to_its_cache_dir(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "gpt2", "--cache_dir", "mine", "--prompt", "he", "--max_new_tokens", "2"]
    generate.main(flags)
    assert all_there(hub, tmp_path / "mine") and capsys.readouterr().out.startswith("he")


def test_each_name_asks_for_its_own_repository(hub, tmp_path):
    for name, repository in pretrained.PRETRAINED_NAMES.items():
        hub.name = repository
        assert pretrained_folder(name, tmp_path) == tmp_path / name
        assert len(list((tmp_path / name).iterdir())) == 4
    assert repository == "distilbert/distilgpt2"


def test_every_gpt_2_of_the_hub_is_fetched_by_its_name_with_the_files_that_it_has(hub, tmp_path):
    hub.name = "some-one/my.gpt_2"
    named = published(d_vocab=258)
    torch.save(named, tmp_path / "weights")
    both = halves(named)
    shards = {f"{part}.safetensors": safetensors({name: named[name] for name in both[part]})
              for part in both}
    index = {name: f"{part}.safetensors" for part in both for name in both[part]}
    tokenizer = {"tokenizer.json": json.dumps(tokenizer_json()).encode()}
    two_files = {"vocab.json": VOCAB_JSON, "merges.txt": MERGES_TXT}
    for case, files in {
        "bin": two_files | {"pytorch_model.bin": (tmp_path / "weights").read_bytes()},
        "shards": tokenizer | shards | {
            "model.safetensors.index.json": json.dumps({"weight_map": index}).encode()},
        "no tokenizer": {"model.safetensors": safetensors(named)},
    }.items():
        hub.files = {"config.json": hub.files["config.json"]} | files
        model = GPT.from_pretrained(hub.name, tmp_path / case)
        assert close(model(tiny_tokens()), gpt2_logits(named, tiny_tokens())), case
        found = {path.name: path.read_bytes() for path in (tmp_path / case / hub.name).iterdir()}
        assert found == hub.files, case

        # A second time, nothing is asked
        hub.requested.clear()
        if case == "no tokenizer":
            GPT.from_pretrained(hub.name, tmp_path / case)
        else:
            assert load_model(hub.name, cache_dir=tmp_path / case)[1].encode("he") == [256], case
        assert not hub.requested, case


def test_a_download_of_shards_that_stopped_is_continued(hub, tmp_path):
    hub.name = "a/b"
    named = published(d_vocab=258)
    del hub.files["model.safetensors"]
    index = {name: f"{part}.safetensors" for part, names in halves(named).items() for name in names}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    for part, names in halves(named).items():
        assert not (tmp_path / "a/b" / f"{part}.safetensors").exists()
        check_refusal(lambda: GPT.from_pretrained("a/b", tmp_path), f"{part}.safetensors")
        hub.files[f"{part}.safetensors"] = safetensors({name: named[name] for name in names})
    assert close(GPT.from_pretrained("a/b", tmp_path)(tiny_tokens()),
                 gpt2_logits(named, tiny_tokens()))


def test_tokens_that_were_added_on_the_hub_are_fetched(hub, tmp_path):
    hub.name = "a/b"
    hub.files |= {"config.json": json.dumps(CONFIG | {"vocab_size": 259}).encode(),
                  "model.safetensors": safetensors(published(d_vocab=259)),
                  "added_tokens.json": b'{"<pad>": 258}'}
    _, tokenizer = load_model("a/b", cache_dir=tmp_path)
    assert tokenizer.encode_document("he<pad>") == [256, 258]


def test_a_name_that_the_hub_lacks_and_another_architecture_are_refused_early(hub, tmp_path):
    check_refusal(lambda: load_model("a/b", cache_dir=tmp_path), "a/b is not a folder",
                  "not there, or not public")
    hub.name = "a/b"
    weights = hub.files.pop("model.safetensors")
    check_refusal(lambda: load_model("a/b", cache_dir=tmp_path), "a/b", "pytorch_model.bin")
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"wte.weight": "config.json"}}'
    check_refusal(lambda: load_model("a/b", cache_dir=tmp_path), "'config.json'", "a .safetensors")
    hub.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights}
    hub.requested.clear()
    check_refusal(lambda: load_model("a/b", cache_dir=tmp_path / "new"), "'llama'")
    assert [file for file, _ in hub.requested] == ["config.json"]


def test_a_path_below_a_folder_here_is_not_asked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    check_refusal(lambda: load_model("outputs/run-9"), "outputs/run-9")
    check_refusal(lambda: GPT.from_pretrained("outputs/run-9"), "outputs/run-9")
    assert not hub.requested


def test_an_interrupted_download_continues_where_it_stopped(hub, tmp_path):
    hub.cuts = [200_000, 100_000]
    pretrained_folder("gpt2", tmp_path)
    assert went_on(of_weights(hub), [200_000, 100_000]) and all_there(hub, tmp_path)


def test_a_server_that_ignores_ranges_sends_all_of_it_again(hub, tmp_path):
    hub.cuts = [200_000]
    hub.ranges = False
    pretrained_folder("gpt2", tmp_path)
    assert went_on(of_weights(hub), [200_000]) and all_there(hub, tmp_path)


def test_a_file_that_is_complete_or_too_long_is_fetched_again(hub, tmp_path):
    path = tmp_path / "model.safetensors"
    whole = hub.files["model.safetensors"]
    for content in (whole, whole + b"more"):
        (tmp_path / "model.safetensors.part").write_bytes(content)
        path.unlink(missing_ok=True)
        hub.requested.clear()
        pretrained.download_missing(address_of_gpt2(), tmp_path, path.name)
        assert of_weights(hub) == [f"bytes={len(content)}-", None]
        assert path.read_bytes() == whole and not path.with_name(f"{path.name}.part").exists()


def assert_has_the_beginning(hub, folder):
    """Of the first 200,000 bytes all but what came in the last piece, up to 64 KiB."""
    part = part_of(folder).read_bytes()
    whole = hub.files["model.safetensors"]
    assert 200_000 - 2**16 < len(part) <= 200_000 and part == whole[: len(part)]


def test_without_a_network_the_part_is_kept_and_the_next_call_continues(hub, tmp_path):
    hub.cuts = [200_000, 0, 0]
    with pytest.raises(NoNetwork, match=r"/model\.safetensors"):
        pretrained_folder("gpt2", tmp_path)
    assert_has_the_beginning(hub, tmp_path)
    assert not (tmp_path / "gpt2/model.safetensors").exists()
    asked = of_weights(hub)[:1]
    hub.requested.clear()
    assert close(GPT.from_pretrained("gpt2", tmp_path)(tiny_tokens()),
                 gpt2_logits(published(d_vocab=258), tiny_tokens()))
    assert went_on(asked + of_weights(hub), [200_000]) and len(hub.requested) == 2


@pytest.mark.parametrize("status", [503, 404])
def test_an_error_of_the_server_leaves_the_part_as_it_is(hub, tmp_path, status):
    hub.cuts = [200_000]
    hub.statuses = [None, status, status]
    with pytest.raises(NoNetwork, match="HTTPError"):
        pretrained_folder("gpt2", tmp_path)
    assert_has_the_beginning(hub, tmp_path)


def test_without_a_server_one_line_says_that_there_is_no_network(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(pretrained, "HUB", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(NoNetwork) as caught:
        pretrained_folder("gpt2", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "gpt2/config.json") in message and "\n" not in message


@pytest.mark.parametrize(("where", "file"), [
    ({"tag": "ab" * 32}, "model.safetensors"), ({"small_tag": "ab" * 20}, "config.json")])
def test_content_with_another_checksum_is_refused_and_deleted(hub, tmp_path, where, file):
    vars(hub).update(where)
    address = f"{pretrained.HUB}{PREFIX}{file}"
    with pytest.raises(UserError, match="its checksum") as caught:
        pretrained_folder("gpt2", tmp_path)
    assert address in str(caught.value) and not isinstance(caught.value, NoNetwork)
    assert [path for path, _ in hub.requested].count(file) == 1  # the same would come again
    assert not list((tmp_path / "gpt2").glob(f"{file}*"))


def test_a_part_of_another_file_is_noticed_and_deleted(hub, tmp_path):
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(b"something else")
    check_refusal(lambda: pretrained_folder("gpt2", tmp_path), "checksum", "try again")
    assert not part_of(tmp_path).exists()
    pretrained_folder("gpt2", tmp_path)
    assert all_there(hub, tmp_path)


def test_a_page_that_asks_for_a_password_is_not_kept_as_a_model(hub, tmp_path):
    page = b"<!doctype html><title>Welcome to the guests' network</title>"
    for name, good in list(hub.files.items()):
        for content in (page, b"", good[:-9] if name != "merges.txt" else b"\xff"):
            hub.files[name] = content
            message = check_refusal(lambda: pretrained_folder("gpt2", tmp_path), name, case=name)
            assert "the file from" in message, message
            assert not list((tmp_path / "gpt2").glob(f"{name}*")), f"{name} is kept"
        hub.files[name] = good
    pretrained_folder("gpt2", tmp_path)
    assert all_there(hub, tmp_path)


def test_published_files_are_recognised_by_their_checksum(hub, tmp_path, monkeypatch):
    address = address_of_gpt2()
    right = hashlib.sha256(MERGES_TXT).hexdigest()
    for published_sha256, refused in (("0" * 64, True), (right, False)):
        monkeypatch.setattr(pretrained, "PUBLISHED_SHA256",
                            {f"{address}/merges.txt": published_sha256})
        path = tmp_path / f"{refused}/merges.txt"
        fetch = partial(pretrained.download_missing, address, path.parent, path.name)
        if refused:
            check_refusal(fetch, "SHA-256")
        else:
            fetch()
        assert path.exists() is not refused


def test_a_server_with_bad_answers_is_asked_a_few_times(hub, tmp_path):
    for status in (416, 204, 500):
        hub.requested.clear()
        hub.statuses = [status] * 1000
        with pytest.raises(NoNetwork):
            pretrained_folder("gpt2", tmp_path)
        assert len(of_weights(hub)) <= 6, f"{status}: asked {len(of_weights(hub))} times"


def test_two_processes_do_not_download_into_one_file(hub, tmp_path):
    path = tmp_path / "gpt2/config.json"
    path.parent.mkdir()
    with utils.locked(path.with_name("config.json.lock"), "busy"):
        check_refusal(lambda: pretrained_folder("gpt2", tmp_path), "another process")
    assert not hub.requested
    pretrained_folder("gpt2", tmp_path)
    assert all_there(hub, tmp_path)


@pytest.mark.parametrize(("small_tag", "weak"), [(None, "W/"), ("no-checksum", "")])
def test_weak_tags_are_checksums_too_and_other_tags_are_not(hub, tmp_path, small_tag, weak):
    hub.small_tag = small_tag
    hub.weak = weak
    pretrained_folder("gpt2", tmp_path)
    assert all_there(hub, tmp_path)


def test_a_weak_tag_that_is_wrong_is_refused(hub, tmp_path):
    hub.small_tag = "ab" * 20
    hub.weak = "W/"
    check_refusal(lambda: pretrained_folder("gpt2", tmp_path), "checksum")


def test_a_cache_dir_that_cannot_be_written_is_a_user_error(hub, tmp_path):
    (tmp_path / "file").write_text("")
    message = check_refusal(lambda: pretrained_folder("gpt2", tmp_path / "file"))
    assert str(tmp_path / "file") in message and "--cache_dir" in message
    assert not hub.requested


def test_a_local_folder_comes_before_the_hub(hub, tmp_path, monkeypatch):
    write_folder(tmp_path / "gpt2", published())
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("gpt2").cfg.d_vocab == D_VOCAB and not hub.requested
