"""GPT-2's published weights: fetch them, read them, and tell each by our name for it.

This module gives a config and tensors and knows no GPT. A checkpoint in Hugging Face's layout is a
folder: config.json, the weights in model.safetensors (or several of them with an index, or
pytorch_model.bin), and the tokenizer's two files.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: tokenizer.py, model.py
Next: weight_circuits.py
Source: Radford et al. 2019 (GPT-2); the safetensors file format
"""

import hashlib
import json
import math
import mmap
import os
import zipfile
from pathlib import Path

import requests
import torch

from config import ModelConfig
from utils import NoNetwork, UserError, atomic_write, fetch_into, read_json, write_json

HUB = "https://huggingface.co"
PRETRAINED_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
CACHE = "~/.cache/gpt2-from-scratch"
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}  # these two for masks, which are left out

# Hugging Face's name of each tensor in a block, and ours; both lay matrices out as [in, out].
BLOCK = {
    "ln_1.weight": "ln1.w", "ln_1.bias": "ln1.b",
    "attn.c_attn.weight": "attn.W_QKV", "attn.c_attn.bias": "attn.b_QKV",
    "attn.c_proj.weight": "attn.W_heads_out", "attn.c_proj.bias": "attn.b_heads_out",
    "ln_2.weight": "ln2.w", "ln_2.bias": "ln2.b",
    "mlp.c_fc.weight": "mlp.W_in", "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.weight": "mlp.W_out", "mlp.c_proj.bias": "mlp.b_out",
}
OUTSIDE = {
    "wte.weight": "token_embedding.W_E", "wpe.weight": "position_embedding.W_pos",
    "ln_f.weight": "ln_final.w", "ln_f.bias": "ln_final.b",
}
HEAD, W_U = "lm_head.weight", "unembedding.W_U"  # [d_vocab, d_model] there, transposed here
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old files carry along
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "add_cross_attention": False,
         "scale_attn_by_inverse_layer_idx": False}


def name_table(n_layers):
    """{Hugging Face's name: our name} for a model of that many layers, the head left out."""
    return OUTSIDE | {f"h.{layer}.{theirs}": f"blocks.{layer}.{ours}"
                      for layer in range(n_layers) for theirs, ours in BLOCK.items()}


def pretrained_folder(name_or_folder, cache_dir=None):
    """The folder of a model in Hugging Face's layout: the one that is given, or a download.
    Raises UserError where there is neither such a folder nor such a name, NoNetwork where the
    download stops (the next call goes on from there).
    """
    if (Path(name_or_folder) / "config.json").exists():
        return Path(name_or_folder)
    if name_or_folder not in PRETRAINED_NAMES:
        raise UserError(f"{name_or_folder!r} is neither a folder with a config.json nor one of: "
                        f"{', '.join(PRETRAINED_NAMES)}")
    folder = Path(cache_dir or os.path.expanduser(CACHE)) / name_or_folder
    for file in FILES:
        if not (folder / file).exists():
            repository = f"{HUB}/{PRETRAINED_NAMES[name_or_folder]}"
            download_file(f"{repository}/resolve/main/{file}", folder / file)
    return folder


def download_file(address, path, attempts=3):
    """Fetches a file, going on where an earlier attempt stopped, and checks it before it counts.
    Raises NoNetwork, or UserError where the server's own checksum disagrees or the disk is full."""
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            response = fetch_into(file, address)
        if not content_matches(part, response):
            part.unlink()
            raise UserError(f"{address} sent something else than its checksum says; try again, or "
                            f"put the file at {path}")
        os.replace(part, path)
    except requests.RequestException as error:
        if attempts > 1:
            return download_file(address, path, attempts - 1)
        raise NoNetwork(f"no network: {address} did not answer ({type(error).__name__}); what came "
                        f"is kept and the next call goes on, or put the file at {path}") from None
    except OSError as error:
        raise UserError(f"cannot write {part}: {error.strerror}; make room or choose another "
                        "--cache_dir") from None


def content_matches(path, response):
    """Whether a file has the checksum that the hub gives for it; True where it gives none.

    The first answer, before it redirects to where large files lie, has the file's SHA-256 as its
    tag, or for small files git's SHA-1 of "blob", their length and their content.
    """
    first = (*response.history, response)[0].headers
    tag = first.get("X-Linked-ETag", first.get("ETag", "")).removeprefix("W/").strip('"')
    algorithm = {64: "sha256", 40: "sha1"}.get(len(tag))
    if algorithm is None:
        return True
    digest = hashlib.new(algorithm)
    if algorithm == "sha1":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == tag


def read_pretrained(folder):
    """(ModelConfig, {our name: tensor}) of a folder in Hugging Face's layout.

    The tensors may be views of a memory-mapped file: copy them. Raises UserError for another
    architecture, broken files, and tensors that are missing (all are named) or unknown.
    """
    folder = Path(folder)
    cfg = read_config(folder / "config.json")
    found = {name.removeprefix("transformer."): tensor
             for name, tensor in read_weights(folder).items()}
    found = {name: tensor for name, tensor in found.items() if not name.endswith(MASKS)}
    head = found.pop(HEAD, None)
    table = name_table(cfg.n_layers)
    if not cfg.tie_embeddings:
        table[HEAD] = W_U
        found |= {} if head is None else {HEAD: head}
    elif head is not None and not torch.equal(head, found.get("wte.weight", head)):
        raise UserError(f"{folder}: {HEAD} is not wte.weight although the config ties them; set "
                        '"tie_word_embeddings": false in config.json')
    missing, unknown = sorted(set(table) - set(found)), sorted(set(found) - set(table))
    if missing or unknown:
        raise UserError("; ".join(
            f"{folder} {what}: {', '.join(names)}" for what, names in
            (("lacks", missing), ("has tensors that are not GPT-2's", unknown)) if names))
    return cfg, {ours: found[theirs].T if theirs == HEAD else found[theirs]
                 for theirs, ours in table.items()}


def read_config(path):
    """The ModelConfig of a config.json. Raises UserError naming what this project can't build."""
    values = read_json(path)
    needed = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type={values.get('model_type')!r} is not supported; "
                        f"GPT-2 and what has its form are: {', '.join(PRETRAINED_NAMES)}")
    if missing := [name for name in needed if type(values.get(name)) is not int]:
        raise UserError(f"{path} lacks whole numbers for {', '.join(missing)}; download it again")
    if type(values.get("n_inner")) not in (int, type(None)):
        raise UserError(f"{path}: n_inner={values['n_inner']!r} is not a whole number or null")
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise UserError(f"{path}: {name}={values[name]} is not supported; GPT-2 has {value}")
    activation = values.get("activation_function", "gelu_new")
    if activation not in list(ACTIVATIONS):
        raise UserError(f"{path}: activation_function={activation!r} is not supported; "
                        f"choose from: {', '.join(ACTIVATIONS)}")
    return ModelConfig(
        n_layers=values["n_layer"], n_heads=values["n_head"], d_model=values["n_embd"],
        d_mlp=values.get("n_inner"), n_ctx=values["n_positions"], d_vocab=values["vocab_size"],
        activation=ACTIVATIONS[activation], tie_embeddings=values.get("tie_word_embeddings", True),
    )


def read_weights(folder):
    """{Hugging Face's name: tensor} of whichever form of weights a folder has."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (folder / name).exists():
            return read(folder / name)
        if (folder / f"{name}.index.json").exists():
            return read_shards(folder / f"{name}.index.json", read)
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin; "
                    "download the weights into it")


def read_shards(index, read):
    """The tensors of all files that an index names, each from the file that it is said to be in."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise UserError(f"{index} has no weight_map of names to file names; download it again")
    shards = {file: read(index.parent / file) for file in sorted(set(places.values()))}
    lost = [name for name, file in places.items() if name not in shards[file]]
    if lost:
        raise UserError(f"{index} promises tensors that its files lack: {', '.join(lost)}")
    return {name: shards[file][name] for name, file in places.items()}


def read_bin(path):
    """The tensors of a pytorch_model.bin; one that asks to run code is refused."""
    try:
        in_pages = zipfile.is_zipfile(path)  # what torch wrote before 1.6 can't be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=in_pages)
    except Exception as error:  # a foreign file can fail anywhere inside the unpickler
        raise UserError(f"{path} is truncated or not a file of weights ({type(error).__name__}); "
                        "download it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} is not a dict of tensors; download it again")
    return tensors


def to_hugging_face(cfg, tensors):
    """{Hugging Face's name: tensor} from {our name: tensor}.

    What the model lacks and GPT-2 has (biases, positions) is written as the zeros that it amounts
    to. Raises UserError for a model whose form GPT-2's cannot hold.
    """
    if cfg.attn_only or cfg.norm == "none" or cfg.unembed_bias:
        raise UserError(f"attn_only={cfg.attn_only}, norm={cfg.norm!r}, unembed_bias="
                        f"{cfg.unembed_bias}: GPT-2's format has MLPs, LayerNorms and no b_U")
    sizes = {"b_QKV": (3 * cfg.d_model,), "b_heads_out": (cfg.d_model,),
             "W_pos": (cfg.n_ctx, cfg.d_model)}
    W_E = tensors[OUTSIDE["wte.weight"]]
    named = {f"transformer.{theirs}": tensors[ours] if ours in tensors
             else W_E.new_zeros(sizes[ours.rpartition(".")[2]])
             for theirs, ours in name_table(cfg.n_layers).items()}
    return named | {HEAD: W_E if cfg.tie_embeddings else tensors[W_U].T}


def write_pretrained(folder, cfg, named):
    """Writes config.json and model.safetensors. named: what `to_hugging_face` gives."""
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[cfg.activation]
    write_json(Path(folder) / "config.json", FIXED | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads, "n_embd": cfg.d_model, "n_inner": cfg.d_mlp,
        "n_positions": cfg.n_ctx, "vocab_size": cfg.d_vocab, "activation_function": activation,
        "tie_word_embeddings": cfg.tie_embeddings,
    })
    named = {name: tensor for name, tensor in named.items()
             if not (cfg.tie_embeddings and name == HEAD)}  # it would be written twice
    write_safetensors(Path(folder) / "model.safetensors", named)


# Safetensors: 8 bytes with the header's length, a JSON header, and the tensors' bytes


def read_safetensors(path):
    """{name: tensor}, views of the memory-mapped file (what is written to them stays in memory).

    Raises UserError, saying what is wrong, for a file whose header does not describe it.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except ValueError:
        raise UserError(f"{path} is empty; download it again") from None
    try:
        header, start = safetensors_header(content)
        return {name: tensor_at(content, name, entry, start)
                for name, entry in checked_entries(header, len(content) - start)}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}; download it again"
                        ) from None


def safetensors_header(content):
    """(header, where the tensors' bytes begin). Raises ValueError where there is none."""
    n_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or n_bytes > len(content) - 8:
        raise ValueError(f"a header of {n_bytes:,} bytes in a file of {len(content):,}")
    header = json.loads(content[8 : 8 + n_bytes].decode(), object_pairs_hook=check_no_doubles)
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return header, 8 + n_bytes


def check_no_doubles(pairs):
    """A JSON object as a dict. Raises ValueError where a name comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice in the header")
    return values


def checked_entries(header, n_bytes):
    """The header's (name, entry) in the order of their bytes, which must follow each other without
    gap or overlap to the file's end. Raises ValueError naming the tensor that is wrong."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in entries:
        found = entry.get("dtype") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or found not in list(DTYPES):  # a list: found may be one too
            raise ValueError(f"{name} has dtype {found!r}, not one of {', '.join(DTYPES)}")
        for field in ("shape", "data_offsets"):
            numbers = entry.get(field)
            if not isinstance(numbers, list) or any(
                    type(n) is not int or not 0 <= n < 2**48 for n in numbers):
                raise ValueError(f"{name} has {field} {numbers!r}")
        if len(entry["data_offsets"]) != 2:
            raise ValueError(f"{name} has data_offsets {entry['data_offsets']}")
    entries.sort(key=lambda item: item[1]["data_offsets"])
    end = 0
    for name, entry in entries:
        first, last = entry["data_offsets"]
        size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if first != end or last - first != size or last > n_bytes:
            raise ValueError(f"{name}, {size:,} bytes, is said to lie at {first:,} to {last:,} of "
                             f"{n_bytes:,}, where {end:,} is next")
        end = last
    if end != n_bytes:
        raise ValueError(f"{n_bytes - end:,} bytes belong to no tensor")
    return entries


def tensor_at(content, name, entry, start):
    """One tensor, a view of the file's bytes."""
    first, last = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    if first == last:
        return torch.empty(entry["shape"], dtype=dtype)
    offset = start + first
    if offset % dtype.itemsize:  # the format does not promise that numbers are aligned
        content, offset = bytearray(content[offset : start + last]), 0
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(entry["shape"])


def write_safetensors(path, tensors):
    """Writes {name: tensor of float32, float16 or bfloat16} in the safetensors format."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    if others := {tensor.dtype for tensor in tensors.values()} - set(codes):
        raise UserError(f"cannot write {', '.join(map(str, others))}; make the model float32 first")
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
