"""GPT-2's published weights: download them, read them, and rename each tensor for this project.

This module returns a config and tensors; it does not import GPT. A checkpoint in Hugging Face's
layout is a folder with config.json, the weights in model.safetensors (or several such files with an
index, or pytorch_model.bin), and the tokenizer in vocab.json and merges.txt, or in tokenizer.json.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: tokenizer.py, model.py
Next: download.py
Source: Radford et al. 2019 (GPT-2); the safetensors file format
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import re
from pathlib import Path

import torch

from config import ModelConfig
from download import download_file
from utils import (
    NoNetwork,
    NotThere,
    UserError,
    at_least_float32,
    atomic_write,
    list_names,
    looking_at,
    open_regular,
    printable,
    read_json,
    read_text,
    read_torch_file,
    write_json,
)

HUB = "https://huggingface.co"
PRETRAINED_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_ID = r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}"  # owner/name
CACHE = "~/.cache/gpt2-from-scratch"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first one that is there is read
# The largest download accepted, in bytes, by file ending; GPT-2 XL's weights are 6.4 * 10^9 bytes
LARGEST_FILES = {".json": 1 << 24, ".txt": 1 << 24, ".safetensors": 1 << 34, ".bin": 1 << 34,
                 ".pth": 1 << 30}
# SHA-256 of the published file at an address, if known
PUBLISHED_SHA256 = {
    f"{HUB}/openai-community/gpt2/resolve/main/{file}": sha256 for file, sha256 in {
        "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }.items()
}
# The largest size that a model may have, under our names and config.json's. The memory that a size
# needs is compared with the weights' own size; these limits keep the arithmetic before that short.
LARGEST_SIZES = {
    "n_layers": 10**4, "n_heads": 10**5, "d_model": 10**6, "d_head": 10**6, "d_mlp": 10**8,
    "n_ctx": 10**9, "d_vocab": 10**9, "d_vocab_out": 10**9,
}
HF_SIZES = {"n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model", "n_inner": "d_mlp",
            "n_positions": "n_ctx", "vocab_size": "d_vocab"}
SPARE_NUMBERS = 10**7  # a model may exceed its weights' file by this many: 40 MB in float32
HEADER_SIZE = 1 << 23  # the largest safetensors header, in bytes: GPT-2 XL's has 60,000
MOST_MISSING_LAYERS = 100  # up to this many more layers than tensors, missing names are listed
MOST_AXES = 8
CHECKSUM_NAME = "content_sha256"  # in the metadata of safetensors files written here
# The safetensors format's codes; after the first line those of masks, which are ignored
SAFETENSORS_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "U8": torch.uint8, "BOOL": torch.bool,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}
WRITTEN_DTYPES = ("F32", "F16", "BF16", "U8", "BOOL")  # not doubles: a model read again is float32

# Hugging Face's name of each tensor in a block, and ours; both store matrices as [in, out].
BLOCK_NAMES = {
    "ln_1.weight": "ln1.w", "ln_1.bias": "ln1.b",
    "attn.c_attn.weight": "attn.W_QKV", "attn.c_attn.bias": "attn.b_QKV",
    "attn.c_proj.weight": "attn.W_heads_out", "attn.c_proj.bias": "attn.b_heads_out",
    "ln_2.weight": "ln2.w", "ln_2.bias": "ln2.b",
    "mlp.c_fc.weight": "mlp.W_in", "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.weight": "mlp.W_out", "mlp.c_proj.bias": "mlp.b_out",
}
OUTER_NAMES = {
    "wte.weight": "token_embedding.W_E", "wpe.weight": "position_embedding.W_pos",
    "ln_f.weight": "ln_final.w", "ln_f.bias": "ln_final.b",
}
HF_UNEMBEDDING = "lm_head.weight"  # [d_vocab, d_model]: the transpose of ours
HF_SCORES = "score.weight"  # [d_vocab_out, d_model], in GPT2ForSequenceClassification
OUR_UNEMBEDDING = "unembedding.W_U"
MASK_ENDINGS = (".attn.bias", ".attn.masked_bias")  # names of constants in old files
# What torch.compile, data-parallel training and GPT2LMHeadModel put before a tensor's name
PREFIXES = r"^(?:(?:_orig_mod|module|transformer)\.)*"
HF_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact",
                  "gelu_fast": "gelu", "relu": "relu"}
# Switches of config.json, and their values in GPT-2. Cross-attention is not supported; the others
# change the attention scores by a factor, which is folded into the weights.
HF_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
HF_ACTIVATION = "gelu_new"  # GPT-2's, if config.json does not say
HF_EPSILON = 1e-5


def name_table(n_layers):
    """{Hugging Face's name: our name} of a model's tensors, without the unembedding."""
    table = dict(OUTER_NAMES)
    for layer in range(n_layers):
        for theirs, ours in BLOCK_NAMES.items():
            table[f"h.{layer}.{theirs}"] = f"blocks.{layer}.{ours}"
    return table


# Download


def is_hub_id(name):
    """Whether a value reads as a model's name on the hub, `owner/name`, and not as a path: no
    folder of the owner's name is here."""
    if not isinstance(name, str) or not re.fullmatch(HUB_ID, name, re.ASCII):
        return False
    return not Path(name.split("/")[0]).is_dir()


def pretrained_folder(name_or_folder, cache_dir=None):
    """The folder of a model in Hugging Face's layout: the given one, or a download.

    name_or_folder: a folder, a name in PRETRAINED_NAMES, or any GPT-2's `owner/name` on the hub.
    cache_dir: where downloads are kept; None for a folder below ~/.cache.
    Raises UserError if there is neither such a folder nor such a name, NoNetwork if the download
    stops (the next call continues it).
    """
    with looking_at(name_or_folder):
        if (Path(name_or_folder) / "config.json").exists():
            return Path(name_or_folder)
    if name_or_folder not in PRETRAINED_NAMES and not is_hub_id(name_or_folder):
        raise UserError(f"{name_or_folder!r} is neither a folder with a config.json, nor a model's "
                        f"owner/name on {HUB}, nor one of: {', '.join(PRETRAINED_NAMES)}")

    folder = Path(cache_dir or os.path.expanduser(CACHE)) / name_or_folder
    if not has_weights(folder):
        download_model(name_or_folder, folder)
    return folder


def has_weights(folder):
    """Whether a folder has a config and all files of its weights, which are downloaded last."""
    if not (folder / "config.json").exists():
        return False
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return True
        if index.exists():
            return all((folder / file).exists() for file in shard_of_each(index).values())
    return False


def download_model(name, folder):
    """Downloads what a model's repository has of the files that are read here.

    name: as in `pretrained_folder`. Raises UserError for another architecture, before its weights
    are downloaded.
    """
    address = f"{HUB}/{PRETRAINED_NAMES.get(name, name)}/resolve/main"
    try:
        download_missing(address, folder, "config.json")
    except (NotThere, NoNetwork) as error:
        raise type(error)(f"{name} is not a folder with a config.json here; {error}") from None
    cfg, _ = read_config(folder / "config.json")

    download_tokenizer(address, folder, cfg.d_vocab)
    download_weights(address, folder)


def download_tokenizer(address, folder, d_vocab):
    """Downloads a tokenizer in two files, and a third if tokens were added; or in one file.

    address: of the model's repository, which may have none of them. d_vocab: of the model.
    """
    try:
        download_missing(address, folder, "vocab.json")
        download_missing(address, folder, "merges.txt")
        if len(read_json(folder / "vocab.json")) < d_vocab:
            with contextlib.suppress(NotThere):
                download_missing(address, folder, "added_tokens.json")
    except NotThere:
        with contextlib.suppress(NotThere):
            download_missing(address, folder, "tokenizer.json")


def download_weights(address, folder):
    """Downloads the weights of a model's repository: one file, or several with an index."""
    for file in WEIGHT_FILES:
        index = f"{file}.index.json"
        with contextlib.suppress(NotThere):
            return download_missing(address, folder, file)
        try:
            download_missing(address, folder, index)
        except NotThere:
            continue
        return download_shards(address, folder, index)
    raise UserError(f"{address} has neither {' nor '.join(WEIGHT_FILES)}; choose another model")


def download_shards(address, folder, index):
    """Downloads weights in several files, which their index names."""
    ending = Path(index.removesuffix(".index.json")).suffix
    for file in sorted(set(shard_of_each(folder / index).values())):
        if Path(file).suffix != ending:
            raise UserError(f"{address}/{index} names the file {printable(repr(file))}, which is "
                            f"not a {ending} file")
        download_missing(address, folder, file)


def download_missing(address, folder, file):
    """Downloads a file of a repository, unless it is in the folder. Raises as `download_file`."""
    if (folder / file).exists():
        return
    address = f"{address}/{file}"
    largest = LARGEST_FILES[Path(file).suffix]
    sha256 = PUBLISHED_SHA256.get(address)
    download_file(address, folder / file, largest, what_is_wrong, sha256=sha256)


def what_is_wrong(path):
    """What is wrong with the content of a downloaded file, still named NAME.part; None if nothing.

    Status 200 alone proves nothing: a page that asks for a password has it too.
    """
    kind = path.name.removesuffix(".part").rpartition(".")[2]
    try:
        if kind == "json":
            read_json(path)
        elif kind == "safetensors":
            read_safetensors(path)
        elif kind in ("bin", "pth"):
            read_bin(path)
        elif not read_text(path).startswith("#version"):
            return "is not a list of merges"
    except UserError as error:
        return f"is not what its name says ({printable(error, 200)})"
    return None


# Read


def read_pretrained(folder):
    """(ModelConfig, {our name: tensor}) from a folder in Hugging Face's layout.

    Attention scores that are scaled in another way than here get their factor in the weights.
    The tensors may be views of a memory-mapped file: copy them. Raises UserError for another
    architecture, for broken files, and for missing or unknown tensors, naming as many as fit into a
    message.
    """
    folder = Path(folder)
    cfg, divisors = read_config(folder / "config.json")

    found = without_prefixes_and_masks(read_weights(folder), folder)
    check_weights_fit(cfg, found, folder)

    # The unembedding. A classifier's is meant for a text's last token. A tied one may be stored
    # a second time; both copies must then be the same
    table = name_table(cfg.n_layers)
    if HF_SCORES in found and found[HF_SCORES].ndim == 2:
        cfg = dataclasses.replace(cfg, tie_embeddings=False, d_vocab_out=len(found[HF_SCORES]))
        table[HF_SCORES] = OUR_UNEMBEDDING
    elif not cfg.tie_embeddings:
        table[HF_UNEMBEDDING] = OUR_UNEMBEDDING
    elif HF_UNEMBEDDING in found:
        unembedding = found.pop(HF_UNEMBEDDING)
        if not torch.equal(unembedding, found.get("wte.weight", unembedding)):
            raise UserError(f"{folder}: {HF_UNEMBEDDING} is not wte.weight although the config "
                            'ties them; set "tie_word_embeddings": false in config.json')

    check_names(found, table, folder, "that are not GPT-2's")
    tensors = {ours: found[theirs] for theirs, ours in table.items()}
    if not cfg.tie_embeddings:
        tensors[OUR_UNEMBEDDING] = tensors[OUR_UNEMBEDDING].T
    return cfg, fold_attention_scale(cfg, tensors, divisors)


def without_prefixes_and_masks(tensors, origin):
    """{name: tensor} without the constants of old files, each name without the prefixes that the
    training or the class of the model put before it.

    Raises UserError, naming `origin`, for a name that occurs with two prefixes, and for a tensor
    that is not of floating-point numbers.
    """
    found = {}
    for full_name, tensor in tensors.items():
        name = re.sub(PREFIXES, "", full_name)
        if name.endswith(MASK_ENDINGS):
            continue
        if name in found:
            raise UserError(f"{origin} has {printable(name)} twice, with and without a prefix; "
                            "remove one of them")
        if not tensor.is_floating_point():
            raise UserError(f"{origin}: {printable(name)} has numbers of {tensor.dtype}, which are "
                            "not weights; convert them to float32")
        found[name] = tensor
    return found


def check_names(found, wanted, origin, unlike, optional=()):
    """Raises UserError, listing names, if a wanted tensor is missing or an unknown one is there.

    found, wanted: names, or dicts by name. origin: where the tensors are. unlike: what the message
    says of unknown ones. optional: names of those wanted that may be missing.
    """
    problems = []
    missing = sorted(set(wanted) - set(optional) - set(found))
    if missing:
        problems.append(f"{origin} lacks: {', '.join(missing)}")
    unknown = sorted(set(map(str, found)) - set(wanted))
    if unknown:
        problems.append(f"{origin} has tensors {unlike}: {list_names(unknown)}")
    if problems:
        raise UserError("; ".join(problems))


def read_config(path):
    """The ModelConfig of a config.json, and what its attention scores are divided by in each layer.

    Raises UserError naming what this project cannot build.
    """
    values = read_json(path, "download it again")
    if "model_type" not in values:
        raise UserError(f"{path} has no model_type, as Hugging Face's format has; "
                        "checkpoint.load_model reads a few other formats, by their own fields")
    if values["model_type"] != "gpt2":
        found = printable(repr(values["model_type"]))
        raise UserError(f"{path}: model_type={found} is not supported; "
                        f"models of GPT-2's form are: {', '.join(PRETRAINED_NAMES)}")
    check_hf_sizes(values, path)
    check_hf_architecture(values, path)

    cfg = make_config(
        path, n_layers=values["n_layer"], n_heads=values["n_head"], d_model=values["n_embd"],
        d_mlp=values.get("n_inner"), n_ctx=values["n_positions"], d_vocab=values["vocab_size"],
        norm_epsilon=values.get("layer_norm_epsilon", HF_EPSILON),
        activation=HF_ACTIVATIONS[values.get("activation_function", HF_ACTIVATION)],
        tie_embeddings=values.get("tie_word_embeddings", True),
    )
    switches = HF_SWITCHES | values
    divisors = [1.0] * cfg.n_layers
    if switches["scale_attn_weights"]:
        divisors = [math.sqrt(cfg.d_head)] * cfg.n_layers
    if switches["scale_attn_by_inverse_layer_idx"]:
        divisors = [divisor * (layer + 1) for layer, divisor in enumerate(divisors)]
    return cfg, divisors


def check_hf_sizes(values, path):
    """Raises UserError for a size of a config.json that is missing, no whole number or too large.

    values: its fields.
    """
    needed = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    missing = [name for name in needed if type(values.get(name)) is not int]
    if missing:
        raise UserError(f"{path} lacks whole numbers for {', '.join(missing)}; download it again")
    if type(values.get("n_inner")) not in (int, type(None)):
        raise UserError(f"{path}: n_inner={printable(repr(values['n_inner']))} is not a whole "
                        "number or null; download it again")
    check_sizes({ours: values.get(theirs) for theirs, ours in HF_SIZES.items()}, path)


def check_hf_architecture(values, path):
    """Raises UserError for a setting of a config.json that this project cannot build.

    values: its fields; what is missing has GPT-2's value.
    """
    for name in (*HF_SWITCHES, "tie_word_embeddings"):
        if type(values.get(name, True)) is not bool:
            raise UserError(f"{path}: {name}={printable(repr(values[name]))} is not true or false; "
                            "download it again")
    if values.get("add_cross_attention"):
        raise UserError(f"{path}: add_cross_attention=True is not supported, because GPT-2 reads "
                        "one text; choose another model")
    epsilon = values.get("layer_norm_epsilon", HF_EPSILON)
    if type(epsilon) not in (int, float) or not 0 <= epsilon <= 1:
        raise UserError(f"{path}: layer_norm_epsilon={printable(repr(epsilon))} is not a number "
                        "from 0 to 1; download it again")
    activation = values.get("activation_function", HF_ACTIVATION)
    if activation not in list(HF_ACTIVATIONS):
        raise UserError(f"{path}: activation_function={printable(repr(activation))} is not "
                        f"supported; choose from: {', '.join(HF_ACTIVATIONS)}")


def make_config(path, **fields):
    """The ModelConfig of a file's sizes. Raises UserError, with the path, for impossible ones."""
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def fold_attention_scale(cfg, tensors, divisors):
    """The weights with queries that make up for another scale of the attention scores.

    Attention here divides the scores by sqrt(d_head). For a model that divides them by another
    number, W_Q and b_Q are multiplied by sqrt(d_head) / that number, which gives its scores.

    tensors: {our name: tensor}. divisors: what that model divides the scores by, one number for
    each layer. Returns a new dict; the given tensors stay as they are.
    """
    d_queries = cfg.n_heads * cfg.d_head
    folded = dict(tensors)
    for layer, divisor in enumerate(divisors):
        if divisor == math.sqrt(cfg.d_head):
            continue
        for name in (f"blocks.{layer}.attn.W_QKV", f"blocks.{layer}.attn.b_QKV"):
            # A tensor of another shape is refused by the model that it is meant for
            if name in tensors and tensors[name].shape[-1:] == (3 * d_queries,):
                folded[name] = at_least_float32(tensors[name]).clone()
                folded[name][..., :d_queries] *= math.sqrt(cfg.d_head) / divisor
    return folded


def check_sizes(sizes, path):
    """Raises UserError if a size of a model, under our name, is impossibly large.

    sizes: a dict; values that are not numbers are ignored here. path: where the sizes come from.
    """
    for name, largest in LARGEST_SIZES.items():
        size = sizes.get(name)
        if isinstance(size, int) and size > largest:
            raise UserError(f"{path}: {name}={printable(size, 30)} is more than {largest:,}; "
                            "download it again")


def check_weights_fit(cfg, tensors, origin):
    """Raises UserError if a config describes a much larger model than the weights are. It is called
    before the model is built, which might use all memory.

    tensors: {name: tensor}, the weights. origin: where both come from, for the message.
    """
    d_model = cfg.d_model
    d_heads = cfg.n_heads * cfg.d_head
    numbers_a_layer = 4 * d_model * d_heads + 3 * d_heads + 6 * d_model
    if not cfg.attn_only:
        numbers_a_layer += 2 * d_model * cfg.d_mlp + cfg.d_mlp
    n_rows = cfg.d_vocab or 0
    if not cfg.tie_embeddings:
        n_rows += cfg.d_vocab_out or 0
    if cfg.positions != "none":
        n_rows += cfg.n_ctx
    expected = cfg.n_layers * numbers_a_layer + n_rows * d_model

    found = sum(tensor.numel() for tensor in tensors.values())
    if expected > 2 * found + SPARE_NUMBERS or cfg.n_layers > len(tensors) + MOST_MISSING_LAYERS:
        raise UserError(f"{origin}: n_layers={cfg.n_layers}, d_model={d_model}, n_heads="
                        f"{cfg.n_heads}, d_head={cfg.d_head}, d_mlp={cfg.d_mlp}, "
                        f"n_ctx={cfg.n_ctx}, d_vocab={cfg.d_vocab}, d_vocab_out="
                        f"{cfg.d_vocab_out} make {expected:,} numbers, and the weights have "
                        f"{found:,}; the config is of another model")


def read_weights(folder):
    """{Hugging Face's name: tensor} from a folder, whichever kind of file holds the weights."""
    for name, read in zip(WEIGHT_FILES, (read_safetensors, read_bin), strict=True):
        if (folder / name).exists():
            return read(folder / name)
        if (folder / f"{name}.index.json").exists():
            return read_shards(folder / f"{name}.index.json", read)
    raise UserError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}; download the weights into "
                    "it")


def read_shards(index, read):
    """{name: tensor} from weights in several files (shards).

    index: a JSON file that says which file holds each tensor. read: reads one of these files.
    """
    file_of = shard_of_each(index)
    shards = {file: read(index.parent / file) for file in sorted(set(file_of.values()))}
    missing = [name for name, file in file_of.items() if name not in shards[file]]
    if missing:
        raise UserError(f"{index} promises tensors that its files lack: {list_names(missing)}")
    return {name: shards[file][name] for name, file in file_of.items()}


def shard_of_each(index):
    """{tensor's name: name of its file} from the index of weights in several files."""
    file_of = read_json(index, "download it again").get("weight_map")
    if not isinstance(file_of, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in file_of.values()
    ):
        raise UserError(f"{index} has no weight_map of names to file names; download it again")
    return file_of


def read_bin(path):
    """{name: tensor} from a pytorch_model.bin; a file that asks to run code is refused."""
    tensors = read_torch_file(path, "a file of weights", "download it again", mmap=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} is not a dict of tensors; download it again")
    return tensors


# Write


def to_hugging_face(cfg, tensors):
    """{Hugging Face's name: tensor}, given {our name: tensor}.

    A bias or position table that GPT-2 has and the model lacks is written as zeros, which compute
    the same. Raises UserError for a model that GPT-2's format cannot hold.
    """
    if cfg.attn_only or cfg.norm == "none" or cfg.unembed_bias:
        raise UserError(f"attn_only={cfg.attn_only}, norm={cfg.norm!r}, unembed_bias="
                        f"{cfg.unembed_bias}: GPT-2's format has MLPs, LayerNorms and no b_U")
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        raise UserError(f"d_head={cfg.d_head}: in GPT-2's format the heads divide d_model="
                        f"{cfg.d_model} among them, and n_heads={cfg.n_heads}")
    if cfg.d_vocab_out != cfg.d_vocab:
        raise UserError(f"d_vocab_out={cfg.d_vocab_out}: GPT-2's format has one logit for each of "
                        f"the d_vocab={cfg.d_vocab} tokens")

    W_E = tensors[OUTER_NAMES["wte.weight"]]
    shapes = {"b_QKV": (3 * cfg.d_model,), "b_heads_out": (cfg.d_model,),
              "W_pos": (cfg.n_ctx, cfg.d_model)}
    named = {}
    for theirs, ours in name_table(cfg.n_layers).items():
        if ours in tensors:
            tensor = tensors[ours]
        else:
            tensor = W_E.new_zeros(shapes[ours.rpartition(".")[2]])
        named[f"transformer.{theirs}"] = tensor
    named[HF_UNEMBEDDING] = W_E if cfg.tie_embeddings else tensors[OUR_UNEMBEDDING].T
    return named


def write_pretrained(folder, cfg, named):
    """Writes config.json and model.safetensors. named: as from `to_hugging_face`."""
    # If two names mean one activation, use the first one in the table
    hf_activation = next(theirs for theirs, ours in HF_ACTIVATIONS.items()
                         if ours == cfg.activation)
    write_json(Path(folder) / "config.json", HF_SWITCHES | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads, "n_embd": cfg.d_model, "n_inner": cfg.d_mlp,
        "n_positions": cfg.n_ctx, "vocab_size": cfg.d_vocab, "activation_function": hf_activation,
        "layer_norm_epsilon": cfg.norm_epsilon, "tie_word_embeddings": cfg.tie_embeddings,
    })

    if cfg.tie_embeddings:  # stored only once, as wte.weight
        named = {name: tensor for name, tensor in named.items() if name != HF_UNEMBEDDING}
    write_safetensors(Path(folder) / "model.safetensors", named)


# Safetensors: 8 bytes with the header's length, a JSON header, and the tensors' bytes


def read_safetensors(path):
    """{name: tensor} from a safetensors file: views of the file, which is mapped into memory.

    Writing to them does not change the file. Raises UserError, saying what is wrong, if the header
    does not match the file.
    """
    try:
        with open_regular(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is empty; download it again") from None

    try:
        header, start = safetensors_header(content)
        entries = checked_entries(header, len(content) - start)
        check_content(header, content, start)
        return {name: tensor_at(content, entry, start) for name, entry in entries}
    except (ValueError, RuntimeError) as error:  # torch's own for a shape that overflows
        raise UserError(f"{path} is not a whole safetensors file: {error}; download it again"
                        ) from None


def safetensors_header(content):
    """(header, where the tensors' bytes begin). Raises ValueError if there is no valid header."""
    n_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or n_bytes > len(content) - 8:
        raise ValueError(f"a header of {n_bytes:,} bytes in a file of {len(content):,}")
    if n_bytes > HEADER_SIZE:
        raise ValueError(f"a header of {n_bytes:,} bytes; at most {HEADER_SIZE:,} are read")
    try:
        header = json.loads(content[8 : 8 + n_bytes].decode(), object_pairs_hook=dict_of_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header: {printable(error)}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return header, 8 + n_bytes


def content_checksum(header, pieces):
    """The SHA-256 of a header's entries and of the tensors' bytes, which are given in pieces."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def check_content(header, content, start):
    """Raises ValueError if a file has a checksum, as those written here do, and it is wrong."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not an object")
    if CHECKSUM_NAME in metadata:
        with memoryview(content) as whole, whole[start:] as tensors:
            found = content_checksum(header, [tensors])
        if found != metadata[CHECKSUM_NAME]:
            raise ValueError("its checksum is wrong: it was damaged")


def dict_of_distinct(pairs):
    """A JSON object as a dict. Raises ValueError if a name occurs twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return values


def checked_entries(header, n_bytes):
    """The header's (name, entry) pairs, in the order of their bytes.

    n_bytes: the number of bytes of tensor data in the file. The entries must cover it without gaps
    or overlaps. Raises ValueError naming the wrong tensor.
    """
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in entries:
        check_entry(printable(name), entry)

    # One after another
    entries.sort(key=lambda item: item[1]["data_offsets"])
    end = 0
    for name, entry in entries:
        first, last = entry["data_offsets"]
        size = math.prod(entry["shape"]) * SAFETENSORS_DTYPES[entry["dtype"]].itemsize
        if first != end or last - first != size or last > n_bytes:
            raise ValueError(f"{printable(name)}, {size:,} bytes, has offsets {first:,} to "
                             f"{last:,} of {n_bytes:,}; they must begin at {end:,}")
        end = last
    if end != n_bytes:
        raise ValueError(f"{n_bytes - end:,} bytes belong to no tensor")
    return entries


def check_entry(name, entry):
    """Raises ValueError, naming the tensor, for an entry of a header that cannot be right."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else entry
    known = list(SAFETENSORS_DTYPES)  # a list, because dtype itself may be unhashable
    if not isinstance(entry, dict) or dtype not in known:
        raise ValueError(f"{name} has dtype {printable(repr(dtype))}, not one of "
                         f"{', '.join(known)}")
    for field in ("shape", "data_offsets"):
        numbers = entry.get(field)
        if not isinstance(numbers, list) or len(numbers) > MOST_AXES or any(
                type(n) is not int or not 0 <= n < 2**48 for n in numbers):
            raise ValueError(f"{name} has {field} {printable(repr(numbers))}")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"{name} has data_offsets {entry['data_offsets']}")


def tensor_at(content, entry, start):
    """One tensor, a view of the file's bytes. start: where the tensors' bytes begin in the file."""
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if first == last:
        return torch.empty(entry["shape"], dtype=dtype)

    offset = start + first
    if offset % dtype.itemsize:  # the format does not guarantee alignment, so copy the bytes
        content = bytearray(content[offset : start + last])
        offset = 0
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(entry["shape"])


def write_safetensors(path, tensors):
    """Writes {name: tensor} in the safetensors format, of the types in WRITTEN_DTYPES."""
    codes = {SAFETENSORS_DTYPES[code]: code for code in WRITTEN_DTYPES}
    other_dtypes = {tensor.dtype for tensor in tensors.values()} - set(codes)
    if other_dtypes:
        listed = ", ".join(map(str, other_dtypes))
        raise UserError(f"cannot write {listed}; make the model float32 first")

    header = {}
    end = 0
    for name, tensor in tensors.items():
        first = end
        end = first + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [first, end]}
    checksum = content_checksum(header, map(bytes_of, tensors.values()))
    header = {"__metadata__": {"format": "pt", CHECKSUM_NAME: checksum}} | header
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers

    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(bytes_of(tensor))


def bytes_of(tensor):
    """A tensor's numbers in row-major order, as an array of bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
