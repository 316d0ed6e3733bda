"""Other projects' models: find out the format of a folder or a file, read it, write it.

    found = find_format("their_model.pt")   # what lies there
    foreign = read_foreign(found)           # a config, tensors under our names, a tokenizer

`checkpoint.load_model` does both and builds the model. This module does not import GPT. It reads
only numbers and texts: nothing in a file is executed, and a size is compared with the file before
memory is taken. Hugging Face's format has a module of its own, pretrained.py.

    TransformerLens   a state dict, alone or in a folder with a config.json of its config's fields
    nanoGPT           its ckpt.pt, and the characters in its meta.pkl
    Tracr             the compiled weights, an .npz of arrays under Haiku's parameter names

After the sections that find a format, read it and check it, each format has a section that needs no
other one. `read_FORMAT` comes first there: sizes, settings, tensors by their names, then a Foreign.

The models must be decoder-only and pre-LayerNorm, as ours are; another kind is refused by its name.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: pretrained.py
Next: weight_circuits.py
Source: Nanda & Bloom 2022 (TransformerLens); Lindner et al. 2023 (Tracr)
"""

import io
import math
import pickletools
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from config import ModelConfig
from pretrained import (
    CACHE,
    HF_UNEMBEDDING,
    HUB,
    OUR_UNEMBEDDING,
    check_names,
    check_sizes,
    check_weights_fit,
    download_missing,
    fold_attention_scale,
    make_config,
    name_table,
    read_safetensors,
    without_prefixes_and_masks,
    write_safetensors,
)
from utils import (
    UserError,
    check_choice,
    check_count,
    list_names,
    looking_at,
    open_regular,
    printable,
    read_json,
    read_torch_file,
    write_json,
)

# Names of the formats
HUGGING_FACE = "Hugging Face"
TRANSFORMER_LENS = "TransformerLens"
NANOGPT = "nanoGPT"
TRACR = "Tracr"
# The sign of each format: a pattern of a tensor's name that each of its files has. Some tools put
# a prefix such as "module." before all names; it ends where the pattern begins, and is removed.
SIGNS = {TRANSFORMER_LENS: r"\bembed\.W_E$", NANOGPT: r"\btransformer\.wte\.weight$",
         TRACR: r"\btoken_embed[./_]embeddings$"}
# Fields by which a config.json differs from Hugging Face's: TransformerLens's and Tracr's
OTHER_CONFIGS = ({"n_layers", "d_model"}, {"num_layers", "key_size"})
WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz")
# Where the tensors and the config are in a file that holds more than tensors
TENSOR_FIELDS = ("state_dict", "model_state_dict", "model")
CONFIG_FIELDS = ("config", "cfg")
NOT_OF_THIS_KIND = "that a model of this format and these settings does not have"
NPZ_SIZE = 1 << 30  # the most bytes that the arrays of an .npz may have together


@dataclass(frozen=True)
class Found:
    """What lies at a path.

    format: its name, such as "TransformerLens". path: of the weights. config: the fields of a
    config.json or of a config in the file; empty without one. tensors: {their name: tensor}, not
    checked yet. content: all that the file of weights holds. The last two are empty for Hugging
    Face's format, which `pretrained.read_pretrained` reads.
    """

    format: str
    path: Path
    config: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    content: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """A model of another project, as this one needs it.

    format: such as "TransformerLens". cfg: a ModelConfig. tensors: {our name: tensor}; they may be
    views of a file. tokenizer: the state of a tokenizer, or None. assumed: in words, what the file
    does not say and was assumed.
    """

    format: str
    cfg: ModelConfig
    tensors: dict
    tokenizer: dict | None = None
    assumed: str = ""


# Find


def is_foreign(path):
    """Whether there may be a model of another project: a folder or file that `find_format` opens.

    It looks at names only. Raises UserError for a folder that may not be looked into.
    """
    path = Path(path)
    with looking_at(path):
        if path.is_dir():
            return (path / "config.json").exists() or bool(weight_files(path))
        return path.suffix in WEIGHT_ENDINGS and path.exists()


def weight_files(folder):
    """The files of weights that lie directly in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_ENDINGS)


def find_format(path):
    """The Found at a path, which is a folder or a file of weights.

    A folder has a config.json, or a single file of weights. A config.json of our formats counts for
    each file beside it that brings none. Raises UserError if no format is known by which to read
    it.
    """
    path = Path(path)
    is_folder = path.is_dir()
    config_path = (path if is_folder else path.parent) / "config.json"
    config = read_json(config_path) if config_path.exists() else {}
    if not is_config(config):
        if is_folder and config_path.exists():
            return Found(HUGGING_FACE, path, config)
        config = {}
    if is_folder:
        path = only_weights(path)

    # The names of the tensors tell the format
    content = read_content(path)
    tensors = tensors_in(content)
    for form, sign in SIGNS.items():
        matches = (re.search(sign, str(name)) for name in tensors)
        match = next(filter(None, matches), None)
        if match:
            prefix = match.string[: match.start()]
            tensors = without_prefix(tensors, prefix, path)
            own = config_in(content)
            config = config or own if is_folder else own or config
            return Found(form, path, config, tensors, content)
    if {"config", "tokenizer", "optimizer", "step"} <= set(content):
        raise UserError(f"{path} is a checkpoint of a run; load the run, {path.parent}, with "
                        f"load_model(..., file={path.name!r})")
    names = list_names(tensors, 3) or "none at all"
    raise UserError(f"{path} has names that belong to none of {', '.join(SIGNS)}: {names}; Hugging "
                    "Face's format needs its config.json")


def only_weights(folder):
    """The path of the only file of weights in a folder; UserError if there is none, or several."""
    paths = weight_files(folder)
    if len(paths) != 1:
        there = list_names([path.name for path in paths]) or "none"
        raise UserError(f"{folder} must have one file of weights ({', '.join(WEIGHT_ENDINGS)}); "
                        f"there: {there}; move the others, or give the file itself")
    return paths[0]


def read_content(path):
    """What a file of weights holds, a dict. Raises UserError for a file that is damaged, that is
    not a dict, or that asks to run code."""
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_torch_file(path, "a file of weights", "save a state dict with torch.save",
                              mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors; save a "
                        "state dict with torch.save")
    return content


def tensors_in(content):
    """The {name: tensor} in a file's content: itself, or one of its fields."""
    for name in TENSOR_FIELDS:
        if isinstance(content.get(name), dict):
            return content[name]
    return content


def without_prefix(tensors, prefix, path):
    """{name: tensor} with a prefix removed from the names. Raises UserError if two become one."""
    named = {str(name).removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise UserError(f"{path} has names twice, with and without {printable(prefix)!r} before "
                        "them; save a state dict again")
    return named


def config_in(content):
    """The config that a file of weights brings along; an empty dict if it brings none."""
    for name in CONFIG_FIELDS:
        config = content.get(name)
        if is_config(config):
            return config
    return {}


def is_config(value):
    """Whether a value is a config of TransformerLens or Tracr."""
    return isinstance(value, dict) and any(fields <= set(value) for fields in OTHER_CONFIGS)


# Read


def read_foreign(found, **told):
    """The Foreign of a Found in any format but Hugging Face's.

    told: what the caller knows and the file may not say: activation, norm, n_heads. Raises
    UserError for what neither says, for what the file contradicts, and for a model that this
    project cannot build.
    """
    told = {name: value for name, value in told.items() if value is not None}
    foreign = READERS[found.format](found, told)
    check_told(told, foreign.cfg, found.path)
    check_weights_fit(foreign.cfg, foreign.tensors, found.path)
    return foreign


def check_told(told, cfg, path):
    """Raises UserError if what the caller told is not so in the ModelConfig of a file."""
    for name, value in told.items():
        own = getattr(cfg, name)
        if value is not None and value != own:
            raise UserError(f"{path} is a model of {name}={own!r}, and "
                            f"{name}={printable(repr(value))} is told; leave it out")


def require_told(told, name, choices, path, meaning):
    """What the caller told under a name. Raises UserError, with the choices, if that is nothing.

    choices: {value: what it means there}. meaning: what the file does not say, in words.
    """
    if name not in told:
        listed = ", ".join(f'"{value}" ({words})' for value, words in choices.items())
        raise UserError(f"{path} does not say {meaning}; put its config.json beside it, or tell it "
                        f"with load_model(path, {name}=...): {listed}")
    return check_choice(name, told[name], choices)


def check_tensors(named, path):
    """Raises UserError for the first value of a state dict that is no tensor."""
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {printable(name)} is a {type(tensor).__name__}, not a "
                            "tensor; save a state dict")


def check_shapes(tensors, shapes, sizes, path):
    """Raises UserError for the first tensor that has another shape than its sizes make, or that
    does not hold real numbers.

    shapes: {name: its axes}, such as "n_heads d_model d_head". sizes: {axis: size}.
    """
    for name, tensor in tensors.items():
        shape = [sizes[axis] for axis in shapes[name].split()]
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {list(tensor.shape)} {tensor.dtype}; it must be "
                            f"numbers [{shapes[name].replace(' ', ', ')}] = {shape}")


def axis_sizes(tensors, name, axes, path):
    """{axis: size} of one tensor, given the words for its axes. Raises UserError if it is missing
    or has another number of axes."""
    tensor = tensors.get(name)
    words = axes.split()
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != len(words):
        there = list(tensor.shape) if isinstance(tensor, torch.Tensor) else "missing"
        raise UserError(f"{path}: {name} is {there}; it must be [{', '.join(words)}]")
    return dict(zip(words, tensor.shape, strict=True))


def count_layers(names, pattern, path):
    """The number of layers, from names of the form `pattern`, whose first group is the number."""
    numbers = {int(match[1]) for match in map(re.compile(pattern).match, names) if match}
    if numbers and max(numbers) + 1 != len(numbers):
        raise UserError(f"{path} has layers up to {max(numbers)}, but only {len(numbers)} of them; "
                        "save it again")
    return len(numbers)


def side_by_side(W):
    """The weights of all heads, [head, d_model, d_head], as one matrix [d_model, head * d_head]."""
    return W.transpose(0, 1).flatten(1)


# TransformerLens

# TransformerLens's names, and the axes of each tensor
TL_OUTER = {
    "embed.W_E": "d_vocab d_model", "pos_embed.W_pos": "n_ctx d_model",
    "unembed.W_U": "d_model d_vocab_out", "unembed.b_U": "d_vocab_out",
}
TL_ATTENTION = {
    "attn.W_Q": "n_heads d_model d_head", "attn.b_Q": "n_heads d_head",
    "attn.W_K": "n_heads d_model d_head", "attn.b_K": "n_heads d_head",
    "attn.W_V": "n_heads d_model d_head", "attn.b_V": "n_heads d_head",
    "attn.W_O": "n_heads d_head d_model", "attn.b_O": "d_model",
}
TL_MLP = {
    "mlp.W_in": "d_model d_mlp", "mlp.b_in": "d_mlp",
    "mlp.W_out": "d_mlp d_model", "mlp.b_out": "d_model",
}
TL_BUFFERS = (".attn.mask", ".attn.IGNORE")  # endings of constants that a state dict holds
TL_SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab", "d_vocab_out")
TL_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu",
                  "gelu_pytorch_tanh": "gelu", "relu": "relu"}
LARGEST_SCALE = 10**9  # the scores are divided by less than this, and by more than 1 / this
TL_EPSILONS = ("eps", "ln_eps", "layer_norm_eps")  # its own name, older ones, and a course's
TL_NORMS = {"LN": "layernorm", "LNPre": "layernorm", None: "none"}
TOLD_ACTIVATIONS = {"gelu": "by tanh: its gelu_new", "gelu_exact": "by erf: its gelu",
                    "relu": "its relu"}
TOLD_NORMS = {"layernorm": "its LNPre, without weights", "none": "its None"}
# Fields of a config: the values that we can build, and what every other value asks for
TL_FIELDS = {
    "attention_dir": (("causal",), "attention in both directions"),
    "positional_embedding_type": (("standard",), "positions that are not added to the stream, "
                                                 "such as rotary or shortformer ones"),
    "shortformer_pos": ((False, None), "shortformer positions"),
    "final_rms": ((False, None), "a final RMS norm"),
    "use_local_attn": ((False, None), "local attention"),
    "parallel_attn_mlp": ((False, None), "attention and MLP in parallel"),
    "gated_mlp": ((False, None), "gated MLPs"),
    "post_embedding_ln": ((False, None), "a norm behind the embedding"),
    "use_normalization_before_and_after": ((False, None), "norms behind the parts (post-LN)"),
    "use_qk_norm": ((False, None), "norms of queries and keys"),
    "num_experts": ((None,), "a mixture of experts"),
    "attn_scores_soft_cap": ((-1, 0, None), "a soft cap on the scores"),
    "output_logits_soft_cap": ((-1, 0, None), "a soft cap on the logits"),
    "use_attn_scale": ((True, False), "a scale that is neither true nor false"),
    "scale_attn_by_inverse_layer_idx": ((True, False, None),
                                        "a scale that is neither true nor false"),
}
# Parts of names that only a model of another kind has
TL_STRANGE = {
    "attn.rotary_": "rotary positions", "mlp.W_gate": "gated MLPs", "mlp.experts": "experts",
    "mlp.ln.": "SoLU with its LayerNorm", "attn._W_K": "keys that heads share",
    "attn.rel_pos_bias": "relative positions", "attn.q_norm": "norms of queries and keys",
    "ln1_post": "norms behind the parts (post-LN)", "embed.ln.": "a norm behind the embedding",
    ".norm": "names from before TransformerLens (its *_old models, with SoLU)",
}
# Published toy models and their repositories. They are read by the layout that TransformerLens
# reads; the weights themselves were not at hand when this was written.
TOY_MODELS = {
    name: repository for n in (1, 2, 3, 4) for name, repository in (
        (f"attn-only-{n}l", f"NeelNanda/Attn_Only_{n}L512W_C4_Code"),
        (f"gelu-{n}l", f"NeelNanda/GELU_{n}L512W_C4_Code"))
}
TOY_FILES = ("config.json", "model_final.pth")
# Names of published models of other kinds: how they begin, and what they need
STRANGE_TOYS = {
    "solu-": "SoLU", "NeelNanda/SoLU": "SoLU",
    "attn-only-2l-demo": "shortformer positions", "attn-only-demo": "shortformer positions",
    "attn-only-2l-induction": "shortformer positions",
    "attn-only-2l-shortformer": "shortformer positions",
    "NeelNanda/Attn-Only-2L512W-Shortformer": "shortformer positions",
    "redwood_attn_2l": "shortformer positions",
    "ArthurConmy/redwood_attn_2l": "shortformer positions",
}


def toy_repository(name):
    """The hub's repository of a TransformerLens toy model, such as "attn-only-2l"; None for another
    name. Raises UserError for a published model that this project cannot build."""
    name = str(name).removesuffix("/")
    for beginning, needed in STRANGE_TOYS.items():
        if name.startswith(beginning):
            raise UserError(f"{name} needs {needed}, which this project does not have; choose "
                            f"from: {', '.join(TOY_MODELS)}")
    if name in TOY_MODELS.values():
        return name
    return TOY_MODELS.get(name.removesuffix("-new").removesuffix("-c4-code"))


def toy_folder(repository, cache_dir=None):
    """The folder of a published toy model, downloaded once. cache_dir: None for below ~/.cache.

    Raises NoNetwork if the download stops; the next call continues it.
    """
    folder = Path(cache_dir or Path(CACHE).expanduser()) / repository.rpartition("/")[2]
    for file in TOY_FILES:
        download_missing(f"{HUB}/{repository}/resolve/main", folder, file)
    return folder


def read_transformer_lens(found, told):
    """The Foreign of a TransformerLens state dict; see `read_foreign`.

    The sizes are those of the tensors; a config must agree with them. Without a config, the model
    is taken as a causal one whose positions are added to the stream. Another scale of the scores
    than ours is folded into the queries.
    """
    path, config = found.path, found.config
    check_tl_fields(config, path)
    tensors = tl_weights(found.tensors, path)

    # Sizes, and what the shapes do not tell
    sizes = tl_sizes(tensors, config, path)
    norm = tl_norm(tensors, config, told, path)
    activation = tl_activation("d_mlp" in sizes, config, told, path)

    # Every tensor, and no other
    shapes = tl_shapes(sizes["n_layers"], has_mlp="d_mlp" in sizes, has_norms=norm == "LN")
    optional = [name for name in shapes if is_bias(name)]
    check_names(tensors, shapes, path, NOT_OF_THIS_KIND, optional)
    check_shapes(tensors, shapes, sizes, path)

    b_U = tensors.get("unembed.b_U")
    cfg = make_config(
        path, **sizes, attn_only="d_mlp" not in sizes, norm=TL_NORMS[norm], activation=activation,
        norm_epsilon=tl_epsilon(config, path),
        attn_bias=any(is_bias(name) and ".attn." in name for name in tensors),
        unembed_bias=b_U is not None and bool(b_U.any()))
    divisors = [tl_divisor(config, cfg.d_head, layer, path) for layer in range(cfg.n_layers)]
    tensors = fold_attention_scale(cfg, from_tl_names(tensors, cfg), divisors)
    assumed = "" if config else "without a config: causal, positions added to the stream"
    return Foreign(TRANSFORMER_LENS, cfg, tensors, assumed=assumed)


def is_bias(name):
    """Whether a tensor is a bias of attention, MLP or unembedding, by TransformerLens's name."""
    return name.rpartition(".")[2].startswith("b_")


def check_tl_fields(config, path):
    """Raises UserError for a field of a config that asks for another kind of model."""
    for name, (values, needed) in TL_FIELDS.items():
        if name in config and config[name] not in values:
            raise UserError(f"{path}: {name}={printable(repr(config[name]))} asks for {needed}, "
                            "which this project does not have; choose another model")
    heads = config.get("n_key_value_heads")
    if heads not in (None, config.get("n_heads")):
        raise UserError(f"{path}: n_key_value_heads={printable(repr(heads))} asks for keys that "
                        "heads share, which this project does not have; choose another model")


def tl_weights(named, path):
    """{name: tensor}, without the constants. Raises UserError for parts of another kind of model,
    and for a mask that is not causal."""
    check_tensors(named, path)
    for name, tensor in named.items():
        check_tl_part(name, tensor, path)
    tensors = {name: tensor.detach() for name, tensor in named.items()
               if not name.endswith(TL_BUFFERS)}

    # LayerNorm has w and b, an RMS norm has w alone
    for name in tensors:
        if name.endswith(".w") and f"{name.removesuffix('.w')}.b" not in tensors:
            raise UserError(f"{path}: {printable(name)} has no bias beside it, as in an RMS norm, "
                            "which this project does not have; choose another model")
    return tensors


def check_tl_part(name, tensor, path):
    """Raises UserError if a tensor is a part of a model of another kind."""
    for part, needed in TL_STRANGE.items():
        if part in name:
            raise UserError(f"{path}: {printable(name)} belongs to {needed}, which this project "
                            "does not have; choose another model")
    if name.endswith(".attn.mask") and not is_causal_mask(tensor):
        raise UserError(f"{path}: {printable(name)} is not a causal mask: local or other "
                        "attention, which this project does not have; choose another model")


def is_causal_mask(mask):
    """Whether a mask of booleans [query_pos, key_pos] shows each position itself and all before."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        return True  # of an older version; there the config says whether attention is causal
    return torch.equal(mask, torch.ones_like(mask).tril())


def tl_sizes(tensors, config, path):
    """{size: number} from the shapes; d_mlp is missing if there are no MLPs.

    Raises UserError if a tensor that tells a size is missing, or if the config says otherwise.
    """
    n_layers = count_layers(tensors, r"blocks\.([0-9]{1,9})\.", path)
    sizes = {"n_layers": n_layers}
    for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
        sizes |= axis_sizes(tensors, name, TL_OUTER[name], path)
    if n_layers:
        sizes |= axis_sizes(tensors, "blocks.0.attn.W_Q", TL_ATTENTION["attn.W_Q"], path)
    else:
        sizes |= {"n_heads": 1, "d_head": sizes["d_model"]}  # nothing depends on them
    if any(".mlp." in name for name in tensors):
        sizes |= axis_sizes(tensors, "blocks.0.mlp.W_in", TL_MLP["mlp.W_in"], path)
    sizes["d_model"] = tensors["embed.W_E"].shape[1]  # later tensors must agree: `check_shapes`

    check_tl_sizes(sizes, config, path)
    return sizes


def check_tl_sizes(sizes, config, path):
    """Raises UserError if a config has another size than the tensors.

    sizes: as from `tl_sizes`. The config may leave sizes out, or set them to -1.
    """
    n_layers = sizes["n_layers"]
    for name in TL_SIZES:
        said = config.get(name)
        known = n_layers or name not in ("n_heads", "d_head")
        if said not in (None, -1) and known and name in sizes and said != sizes[name]:
            raise UserError(f"{path}: the config says {name}={printable(repr(said))}, and the "
                            f"tensors have {sizes[name]}; they are of two models, so put the "
                            "config of this one there")
    attn_only = config.get("attn_only")
    if n_layers and attn_only is not None and attn_only != ("d_mlp" not in sizes):
        raise UserError(f"{path}: the config says attn_only={printable(repr(attn_only))}, and the "
                        "tensors say otherwise; they are of two models, so put the config of this "
                        "one there")


def tl_norm(tensors, config, told, path):
    """TransformerLens's word for the norm: "LN", "LNPre", or None for no norm."""
    norm = "LN" if "ln_final.w" in tensors else "unsaid"
    for name in ("normalization", "normalization_type"):
        norm = config.get(name, norm)
    if norm == "unsaid":
        chosen = require_told(told, "norm", TOLD_NORMS, path,
                              "whether the stream is normalised (there are no ln1.w)")
        return "LNPre" if chosen == "layernorm" else None
    if norm not in list(TL_NORMS):
        raise UserError(f"{path}: normalization_type={printable(repr(norm))} is not a norm that "
                        "this project has (LN, LNPre, none); choose another model")
    return norm


def tl_activation(has_mlp, config, told, path):
    """Our word for the activation; without MLPs, it does not matter and is not asked for."""
    act_fn = config.get("act_fn")
    if not has_mlp:
        return told.get("activation", TL_ACTIVATIONS.get(str(act_fn), "gelu"))
    if act_fn is None:
        return require_told(told, "activation", TOLD_ACTIVATIONS, path, "the MLPs' activation")
    if act_fn not in list(TL_ACTIVATIONS):
        raise UserError(f"{path}: act_fn={printable(repr(act_fn))} is not an activation that this "
                        f"project has ({', '.join(TL_ACTIVATIONS)}); choose another model")
    return TL_ACTIVATIONS[act_fn]


def tl_epsilon(config, path):
    """What the LayerNorms add to the variance. Raises UserError unless it is from 0 to 1."""
    name = next((name for name in TL_EPSILONS if name in config), "eps")
    value = config.get(name, 1e-5)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UserError(f"{path}: {name}={printable(repr(value))} is not possible; it must be a "
                        "number from 0 to 1")
    return value


def tl_divisor(config, d_head, layer, path):
    """What a layer divides its attention scores by."""
    divisor = 1.0
    if config.get("use_attn_scale", True):
        divisor = config.get("attn_scale")
        if divisor in (None, -1):
            divisor = math.sqrt(d_head)
        if type(divisor) not in (int, float) or not 1 / LARGEST_SCALE < divisor < LARGEST_SCALE:
            raise UserError(f"{path}: attn_scale={printable(repr(divisor))} is not possible; it "
                            f"must be between 1 / {LARGEST_SCALE:,} and {LARGEST_SCALE:,}")
    if config.get("scale_attn_by_inverse_layer_idx"):
        divisor *= layer + 1
    return divisor


def tl_shapes(n_layers, has_mlp, has_norms):
    """{TransformerLens's name: its axes} of a model's tensors."""
    block = dict(TL_ATTENTION)
    norms = ["ln1"]
    if has_mlp:
        block |= TL_MLP
        norms.append("ln2")

    shapes = dict(TL_OUTER)
    for layer in range(n_layers):
        shapes |= {f"blocks.{layer}.{name}": axes for name, axes in block.items()}
        if has_norms:
            names = [f"blocks.{layer}.{norm}" for norm in norms]
            shapes |= {f"{name}.{leaf}": "d_model" for name in names for leaf in "wb"}
    if has_norms:
        shapes |= {"ln_final.w": "d_model", "ln_final.b": "d_model"}
    return shapes


def from_tl_names(tensors, cfg):
    """{our name: tensor}, given {TransformerLens's name: tensor}. A missing bias becomes zeros; a
    norm without weights has weight 1."""
    ours = {"token_embedding.W_E": tensors["embed.W_E"],
            "position_embedding.W_pos": tensors["pos_embed.W_pos"],
            "unembedding.W_U": tensors["unembed.W_U"]}
    if cfg.unembed_bias:
        ours["unembedding.b_U"] = tensors["unembed.b_U"]

    shapes = tl_shapes(cfg.n_layers, not cfg.attn_only, cfg.norm == "layernorm")
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        W_Q, W_K, W_V, W_O = (tensors[f"{block}.attn.W_{letter}"] for letter in "QKVO")
        ours[f"{block}.attn.W_QKV"] = torch.cat([side_by_side(W) for W in (W_Q, W_K, W_V)], 1)
        ours[f"{block}.attn.W_heads_out"] = W_O.flatten(0, 1)
        if cfg.attn_bias:
            no_bias = torch.zeros(cfg.n_heads * cfg.d_head)
            biases = [tensors.get(f"{block}.attn.b_{letter}", no_bias) for letter in "QKV"]
            ours[f"{block}.attn.b_QKV"] = torch.cat([bias.flatten() for bias in biases])
            b_O = tensors.get(f"{block}.attn.b_O", torch.zeros(cfg.d_model))
            ours[f"{block}.attn.b_heads_out"] = b_O

    # MLPs and norms have the same names here
    for name, axes in shapes.items():
        if ".mlp." in name or ".ln" in f".{name}":
            size = [getattr(cfg, axis) for axis in axes.split()]
            ours[name] = tensors[name] if name in tensors else default_of(name, size)
    return ours


def default_of(name, size):
    """What a missing bias or norm computes as: zeros, or ones for a norm's weight."""
    return torch.ones(size) if name.endswith(".w") else torch.zeros(size)


def to_transformer_lens(cfg, tensors):
    """{TransformerLens's name: tensor}, given {our name: tensor}, W_pos and W_U among them.

    A bias or a position table that the model lacks is written as zeros, which compute the same. The
    constants that HookedTransformer keeps in its state dict are there too.
    """
    W_E = tensors["token_embedding.W_E"]
    shape = (cfg.n_heads, cfg.d_head)
    named = {"embed.W_E": W_E,
             "pos_embed.W_pos": tensors.get("position_embedding.W_pos"),
             "unembed.W_U": W_E.T if cfg.tie_embeddings else tensors["unembedding.W_U"],
             "unembed.b_U": tensors.get("unembedding.b_U")}
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        b_QKV = tensors.get(f"{block}.attn.b_QKV")
        W_QKV = tensors[f"{block}.attn.W_QKV"]
        W_QKV = W_QKV.unflatten(1, (3, *shape))  # [d_model, 3, head, d_head]
        for which, letter in enumerate("QKV"):
            named[f"{block}.attn.W_{letter}"] = W_QKV[:, which].transpose(0, 1)
            bias = None if b_QKV is None else b_QKV.unflatten(0, (3, *shape))[which]
            named[f"{block}.attn.b_{letter}"] = bias
        named[f"{block}.attn.W_O"] = tensors[f"{block}.attn.W_heads_out"].unflatten(0, shape)
        named[f"{block}.attn.b_O"] = tensors.get(f"{block}.attn.b_heads_out")
        named[f"{block}.attn.mask"] = torch.ones(cfg.n_ctx, cfg.n_ctx, dtype=torch.bool).tril()
        named[f"{block}.attn.IGNORE"] = torch.tensor(-math.inf)

    # Norms and MLPs have the same names there; what is still missing is zero
    shapes = tl_shapes(cfg.n_layers, not cfg.attn_only, cfg.norm == "layernorm")
    for name, axes in shapes.items():
        if named.get(name) is None:
            size = [getattr(cfg, axis) for axis in axes.split()]
            named[name] = tensors[name] if name in tensors else W_E.new_zeros(size)
    return {name: tensor.contiguous() for name, tensor in named.items()}


def write_transformer_lens(folder, cfg, named):
    """Writes config.json, the fields of a HookedTransformerConfig, and model.safetensors.

    named: as from `to_transformer_lens`.
    """
    act_fn = next(theirs for theirs, ours in TL_ACTIVATIONS.items() if ours == cfg.activation)
    write_json(Path(folder) / "config.json", {
        "n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "d_model": cfg.d_model,
        "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "n_ctx": cfg.n_ctx, "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out, "act_fn": act_fn, "attn_only": cfg.attn_only,
        "normalization_type": "LN" if cfg.norm == "layernorm" else None,
        "eps": cfg.norm_epsilon, "positional_embedding_type": "standard",
        "attention_dir": "causal",
    })
    write_safetensors(Path(folder) / "model.safetensors", named)


# nanoGPT

NANOGPT_SIZES = {"n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model",
                 "block_size": "n_ctx", "vocab_size": "d_vocab"}
NANOGPT_OTHERS = ("bias", "dropout")  # the other fields of its model_args
# The matrices that torch's Linear stores as [out, in]; ours, and Hugging Face's, are [in, out]
NANOGPT_LINEARS = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
META_SIZE = 1 << 22  # the most bytes in a meta.pkl; 150,000 characters take 4 * 10^6
# The instructions of a pickle that put a number or a text, which stands in the file, on the stack
PICKLED_VALUES = ("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE")


def read_nanogpt(found, told):
    """The Foreign of nanoGPT's ckpt.pt; see `read_foreign`.

    Its names are Hugging Face's, but its matrices are [out, in]. Its GELU is the exact one since
    June 2023; what is older can be told by activation="gelu", and is known to be if it has no field
    for biases. A model without biases gets zeros where ours has no switch for them. The tokenizer
    is that of meta.pkl (`find_meta`).
    """
    path = found.path
    model_args = found.content.get("model_args")
    sizes = nanogpt_sizes(model_args, path)
    check_tensors(found.tensors, path)
    tensors = without_prefixes_and_masks(found.tensors, path)

    # The head is W_E itself, unless somebody has changed the model
    head = tensors.get(HF_UNEMBEDDING)
    tied = head is None or torch.equal(head, tensors["wte.weight"])
    if tied:
        tensors.pop(HF_UNEMBEDDING, None)

    # Every tensor, and no other
    has_biases = model_args.get("bias", True)
    table = name_table(sizes["n_layers"])
    if not tied:
        table[HF_UNEMBEDDING] = OUR_UNEMBEDDING
    wanted = [name for name in table if has_biases or not name.endswith(".bias")]
    check_names(tensors, wanted, path, NOT_OF_THIS_KIND)

    # The config
    wide = tensors.get("h.0.mlp.c_fc.weight")  # [d_mlp, d_model]
    d_mlp = None if wide is None or wide.ndim == 0 else wide.shape[0]
    usual = "gelu_exact" if "bias" in model_args else "gelu"
    activation = check_choice("activation", told.get("activation", usual), TOLD_ACTIVATIONS)
    cfg = make_config(path, **sizes, d_mlp=d_mlp, activation=activation, tie_embeddings=tied,
                      attn_bias=has_biases)
    check_weights_fit(cfg, tensors, path)

    # The characters
    meta = find_meta(found)
    tokenizer = None if meta is None else read_meta(meta, cfg.d_vocab)
    return Foreign(NANOGPT, cfg, from_nanogpt_names(tensors, table, cfg), tokenizer,
                   nanogpt_assumptions(activation, meta))


def nanogpt_sizes(model_args, path):
    """{our name: size} from a checkpoint's model_args. Raises UserError if they are not nanoGPT's,
    naming a field of a model that was made from it."""
    if not isinstance(model_args, dict):
        raise UserError(f"{path} has no model_args, as nanoGPT's checkpoints have; of weights "
                        "in Hugging Face's format, give the folder with their config.json")
    if not isinstance(model_args.get("bias", True), bool):
        raise UserError(f"{path}: model_args: bias={printable(repr(model_args['bias']))} is not "
                        "True or False")
    sizes = {
        ours: check_count(f"{path}: model_args: {theirs}", model_args.get(theirs),
                          least=int(theirs != "n_layer"))
        for theirs, ours in NANOGPT_SIZES.items()
    }
    check_sizes(sizes, path)
    for name, value in model_args.items():
        is_off = value is None or (isinstance(value, (bool, int, float)) and not value)
        if name not in (*NANOGPT_SIZES, *NANOGPT_OTHERS) and not is_off:
            raise UserError(f"{path}: model_args has {printable(name)}={printable(repr(value))}, "
                            "which nanoGPT does not have; choose a model that has not been changed")
    return sizes


def from_nanogpt_names(tensors, table, cfg):
    """{our name: tensor}. tensors, table: by nanoGPT's names, and {its name: ours}."""
    zeros = {"ln1.b": cfg.d_model, "ln2.b": cfg.d_model, "ln_final.b": cfg.d_model,
             "mlp.b_in": cfg.d_mlp, "mlp.b_out": cfg.d_model}
    named = {}
    for theirs, ours in table.items():
        if theirs in tensors:
            is_turned = theirs.endswith(NANOGPT_LINEARS) or theirs == HF_UNEMBEDDING
            tensor = tensors[theirs]
            named[ours] = tensor.T if is_turned and tensor.ndim == 2 else tensor
        elif not ours.endswith((".b_QKV", ".b_heads_out")):  # these are left out with attn_bias
            size = next(n for name, n in zeros.items() if ours.endswith(name))
            named[ours] = torch.zeros(size)
    return named


def nanogpt_assumptions(activation, meta):
    """What a ckpt.pt does not say, in words. meta: the path of its meta.pkl, or None."""
    assumed = []
    if activation == "gelu_exact":
        assumed.append('the GELU by erf; before June 2023 it was by tanh: activation="gelu"')
    if meta is None:
        assumed.append("without characters; for them, put nanoGPT's meta.pkl beside it")
    else:
        assumed.append(f"characters from {meta}")
    return "; ".join(assumed)


def find_meta(found):
    """The path of the meta.pkl with a checkpoint's characters; None if there is none.

    It lies beside the checkpoint, or where nanoGPT has it: in data/DATASET, beside the folder of
    the checkpoint.
    """
    folder = found.path.absolute().parent
    places = [folder / "meta.pkl"]
    config = found.content.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    is_name = isinstance(dataset, str) and dataset.isprintable() and Path(dataset).name == dataset
    if is_name and dataset not in ("", ".."):
        places.append(folder.parent / "data" / dataset / "meta.pkl")
    return next((place for place in places if place.is_file()), None)


def read_meta(path, d_vocab):
    """The state of a CharTokenizer from nanoGPT's meta.pkl. Raises UserError if the file holds
    anything but one character for each id, or more of them than d_vocab."""
    meta = read_plain_pickle(path)
    symbols = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(symbols, dict) or set(symbols) != set(range(len(symbols))):
        raise UserError(f"{path} has no itos with a character for each of the ids 0, 1, 2, …; make "
                        "it again, or move it away to load the model alone")
    symbols = [symbols[i] for i in range(len(symbols))]
    wrong = [symbol for symbol in symbols if not isinstance(symbol, str) or len(symbol) != 1]
    if wrong or meta.get("stoi") != {symbol: i for i, symbol in enumerate(symbols)}:
        found = f"itos has {printable(repr(wrong[0]))}" if wrong else "stoi is not itos reversed"
        raise UserError(f"{path}: {found}; only tokenizers by single characters are read; move the "
                        "file away to load the model alone")
    if len(symbols) > d_vocab:
        raise UserError(f"{path} has {len(symbols):,} characters and the model {d_vocab:,} tokens; "
                        "put the model's own there")
    return {"kind": "char", "symbols": symbols}


def read_plain_pickle(path):
    """The dict of texts and whole numbers in a pickle, without unpickling it.

    A pickle is a program for a machine with a stack, and may call any function. Here only those of
    its instructions are carried out that build such a dict. Raises UserError, with its name, for
    any other, and for a file that is damaged or too large.
    """
    with open_regular(path) as file:
        content = file.read(META_SIZE + 1)
    if len(content) > META_SIZE:
        raise UserError(f"{path} has more than {META_SIZE:,} bytes; give nanoGPT's meta.pkl")

    try:
        (value,) = stack_of_pickle(content, path)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole pickle ({printable(error)}); make it again"
                        ) from None
    return value


def stack_of_pickle(content, path):
    """The stack, a list, after the instructions of a pickle; see `read_plain_pickle`."""
    stack = []
    marks = []  # lengths that the stack had
    memo = {}  # values to use again, by number

    for instruction, argument, _ in pickletools.genops(content):
        name = instruction.name
        if name in PICKLED_VALUES:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):  # keys and values go into the dict below them
            start = marks.pop() if name == "SETITEMS" else len(stack) - 2
            items = stack[start:]
            del stack[start:]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UserError(f"{path} has the instruction {name}, which no plain dict of texts and "
                            "numbers needs; it is not carried out: give nanoGPT's meta.pkl")
    return stack


# Tracr

TRACR_OUTER = {"token_embed/embeddings": "d_vocab d_model", "pos_embed/embeddings": "n_ctx d_model"}
TRACR_LAYER = {
    "attn/query/w": "d_model d_heads", "attn/query/b": "d_heads",
    "attn/key/w": "d_model d_heads", "attn/key/b": "d_heads",
    "attn/value/w": "d_model d_heads", "attn/value/b": "d_heads",
    "attn/linear/w": "d_heads d_model", "attn/linear/b": "d_model",
    "mlp/linear_1/w": "d_model d_mlp", "mlp/linear_1/b": "d_mlp",
    "mlp/linear_2/w": "d_mlp d_model", "mlp/linear_2/b": "d_model",
}
# The readout [d_model, d_vocab_out]; it is no parameter there, so people name it themselves
TRACR_UNEMBEDDINGS = ("unembed", "unembed/w", "unembed/embeddings", "unembedding", "unembedding/w")
TRACR_SETTINGS = ("n_heads", "num_heads", "key_size", "d_head", "causal", "layer_norm")
# Arrays that repeat what the shapes say, or what does not matter without training
TRACR_IGNORED = ("n_layers", "num_layers", "d_mlp", "mlp_hidden_size", "d_model", "d_vocab",
                 "n_ctx", "max_seq_len", "dropout_rate")


def read_tracr(found, told):
    """The Foreign of a compiled program: arrays named MODULE/w, MODULE/b and MODULE/embeddings.

    The number of heads must be there, as an array `n_heads` or `key_size`, in a config.json, or be
    told. Without an array `unembed` [d_model, d_vocab_out], the logits are the final stream itself,
    whose axes are the program's variables. Tracr's scores are divided by sqrt(key_size), as ours.
    """
    path = found.path
    said = {name: np.asarray(value) for name, value in found.config.items()
            if name in TRACR_SETTINGS}
    settings, tensors = tracr_arrays(said | found.tensors, path)
    check_tracr_kind(settings, tensors, path)
    unembedding = tensors.pop("unembed", None)

    # Sizes
    n_layers = count_layers(tensors, r"transformer/layer_([0-9]{1,9})/", path)
    sizes = tracr_sizes(tensors, n_layers, path)
    n_heads = tracr_heads(settings, sizes["d_heads"], told, path)

    # Every array, and no other
    shapes = tracr_shapes(n_layers)
    optional = [name for name in shapes if name.endswith("/b")]
    check_names(tensors, shapes, path, NOT_OF_THIS_KIND, optional)
    check_shapes(tensors, shapes, sizes, path)
    d_vocab_out = sizes["d_model"]
    if unembedding is not None:
        d_vocab_out = axis_sizes({"unembed": unembedding}, "unembed", "d_model out", path)["out"]

    cfg = make_config(
        path, n_layers=n_layers, n_heads=n_heads, d_head=sizes["d_heads"] // n_heads,
        d_model=sizes["d_model"], d_mlp=sizes["d_mlp"], n_ctx=sizes["n_ctx"],
        d_vocab=sizes["d_vocab"], d_vocab_out=d_vocab_out, norm="none", activation="relu")
    check_weights_fit(cfg, tensors, path)
    assumed = []
    if "causal" not in settings:
        assumed.append("taken as compiled with causal=True")
    if unembedding is None:
        unembedding = torch.eye(cfg.d_model)
        assumed.append("the logits are the final stream")
    return Foreign(TRACR, cfg, from_tracr_names(tensors, unembedding, cfg),
                   assumed="; ".join(assumed))


def check_tracr_kind(settings, tensors, path):
    """Raises UserError for a program that looks ahead, or that has LayerNorms."""
    if settings.get("causal", True) != 1:
        raise UserError(f"{path}: causal is false: attention in both directions, which this "
                        "project does not have; compile the program with causal=True")
    if settings.get("layer_norm", False) != 0 or any("layer_norm" in name for name in tensors):
        raise UserError(f"{path} has LayerNorms as Haiku makes them; compile the program without")


def tracr_sizes(tensors, n_layers, path):
    """{size: number} from the shapes; d_heads is the width of all heads together."""
    sizes = {}
    for name in TRACR_OUTER:
        sizes |= axis_sizes(tensors, name, TRACR_OUTER[name], path)
    if n_layers:
        for name in ("attn/query/w", "mlp/linear_1/w"):
            first = f"transformer/layer_0/{name}"
            sizes |= axis_sizes(tensors, first, TRACR_LAYER[name], path)
    without_layers = {"d_heads": sizes["d_model"], "d_mlp": 1}  # nothing depends on them
    return without_layers | sizes


def tracr_shapes(n_layers):
    """{Haiku's name: its axes} of a program's arrays, without the readout."""
    shapes = dict(TRACR_OUTER)
    for layer in range(n_layers):
        shapes |= {f"transformer/layer_{layer}/{name}": axes for name, axes in TRACR_LAYER.items()}
    return shapes


def tracr_arrays(arrays, path):
    """(settings {name: number}, weights {name: tensor of float32}) from {name: array}.

    The last part of a name may be joined by a full stop or an underscore instead of a slash. Arrays
    of text, such as the labels of the stream's axes, are left out.
    """
    settings = {}
    tensors = {}
    for full_name, array in arrays.items():
        name = re.sub(r"[./_](w|b|embeddings)$", r"/\1", full_name)
        name = "unembed" if name in TRACR_UNEMBEDDINGS else name
        if name in settings or name in tensors:
            raise UserError(f"{path} has {printable(full_name)} twice; save it again")
        kind = array.dtype.kind
        if name in TRACR_SETTINGS:
            if array.size != 1 or kind not in "iub":
                raise UserError(f"{path}: {name} is {list(array.shape)} {array.dtype}; it must be "
                                "one whole number")
            settings[name] = int(array.item())
        elif name.startswith("activation") and kind in "US":
            check_choice(f"{path}: {name}", str(array), ["relu"])
        elif kind in "fiub" and name not in TRACR_IGNORED:
            tensors[name] = torch.from_numpy(array.astype(np.float32))
        elif kind not in "US" and name not in TRACR_IGNORED:
            raise UserError(f"{path}: {printable(name)} is {array.dtype}, not numbers; save it "
                            "again")
    return settings, tensors


def tracr_heads(settings, d_heads, told, path):
    """The number of heads: as told, or from a setting. Raises UserError if it is not known, or does
    not divide the width of all heads."""
    n_heads = settings.get("n_heads", settings.get("num_heads"))
    d_head = settings.get("key_size", settings.get("d_head"))
    if "n_heads" in told:
        n_heads = check_count("n_heads", told["n_heads"])
    if n_heads is None and not d_head:
        raise UserError(f"{path} does not say the number of heads; tell it with load_model(path, "
                        "n_heads=...), or save it as an array n_heads")

    # Each follows from the other, and together they must fill the columns
    n_heads = d_heads // d_head if n_heads is None else n_heads
    d_head = d_heads // max(n_heads, 1) if d_head is None else d_head
    if n_heads < 1 or n_heads * d_head != d_heads:
        raise UserError(f"{path}: {n_heads} heads of {d_head} do not make the {d_heads} columns of "
                        "query/w; tell the right n_heads")
    return n_heads


def from_tracr_names(tensors, unembedding, cfg):
    """{our name: tensor}, given {Haiku's name: tensor}; a missing bias is zero."""
    ours = {"token_embedding.W_E": tensors["token_embed/embeddings"],
            "position_embedding.W_pos": tensors["pos_embed/embeddings"],
            "unembedding.W_U": unembedding}
    for layer in range(cfg.n_layers):
        theirs = f"transformer/layer_{layer}"
        weights = {name: tensors.get(f"{theirs}/{name}") for name in TRACR_LAYER}
        for name in weights:
            if weights[name] is None:
                weights[name] = torch.zeros(tensors[f"{theirs}/{name[:-1]}w"].shape[1])
        qkv = ("attn/query", "attn/key", "attn/value")
        ours |= {
            f"blocks.{layer}.attn.W_QKV": torch.cat([weights[f"{name}/w"] for name in qkv], 1),
            f"blocks.{layer}.attn.b_QKV": torch.cat([weights[f"{name}/b"] for name in qkv]),
            f"blocks.{layer}.attn.W_heads_out": weights["attn/linear/w"],
            f"blocks.{layer}.attn.b_heads_out": weights["attn/linear/b"],
            f"blocks.{layer}.mlp.W_in": weights["mlp/linear_1/w"],
            f"blocks.{layer}.mlp.b_in": weights["mlp/linear_1/b"],
            f"blocks.{layer}.mlp.W_out": weights["mlp/linear_2/w"],
            f"blocks.{layer}.mlp.b_out": weights["mlp/linear_2/b"],
        }
    return ours


def read_npz(path):
    """{name: array} from an .npz, a zip file of arrays; arrays of Python objects are refused.

    The size that each header promises is compared with the bytes before an array is made.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                names = {record.filename for record in records}
                total = sum(record.file_size for record in records)
                if len(names) < len(records) or total > NPZ_SIZE:
                    raise ValueError(f"{len(records)} arrays under {len(names)} names, "
                                     f"{total:,} bytes of at most {NPZ_SIZE:,}")
                return {record.filename.removesuffix(".npy"): array_of(archive.read(record))
                        for record in records}
        except Exception as error:  # a foreign file can fail anywhere inside the unpacker
            reason = error if isinstance(error, ValueError) else type(error).__name__
            raise UserError(f"{path} is not a whole .npz of numbers ({printable(reason)}); save it "
                            "with numpy.savez") from None


def array_of(content):
    """The array in the bytes of an .npy file. Raises ValueError if they are not one."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"an array of version {version}")
    if dtype.hasobject:
        raise ValueError("an array of Python objects")

    n_bytes = len(content) - stream.tell()
    if math.prod(shape) * dtype.itemsize != n_bytes:
        raise ValueError(f"an array {list(shape)} {dtype} with {n_bytes:,} bytes")
    numbers = np.frombuffer(content, dtype=dtype, offset=stream.tell())
    array = numbers.reshape(shape[::-1]).T if by_columns else numbers.reshape(shape)
    return array.astype(dtype.newbyteorder("="))  # a copy, writable and in this machine's order


READERS = {TRANSFORMER_LENS: read_transformer_lens, NANOGPT: read_nanogpt, TRACR: read_tracr}
