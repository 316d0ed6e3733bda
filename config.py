"""The settings of a run, each with its help text, and the command line built from them.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Prerequisites: utils.py
Next: plotting.py
Source: Radford et al. 2019 (the shape of GPT-2)
"""

import argparse
import dataclasses
import functools
import itertools
import numbers
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

from utils import UserError, as_index, check_choice, suggest_closest

INFINITY = float("inf")
# The seeds that torch.Generator accepts: a test of a value, and words for `check_field`
SEEDS = (lambda seed: 0 <= seed < 2**63, "from 0 to 2^63 - 1")
PRESETS = {"gpt2": {"n_layers": 12, "n_heads": 12, "d_model": 768, "n_ctx": 1024,
                    "tie_embeddings": True}}


def option(default, help):
    """A dataclass field with a default and a help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    dataset: Literal["auto", "tiny_shakespeare", "builtin"] = option(
        "auto", "auto: Tiny Shakespeare, or the built-in corpus without a network"
    )
    path: str | None = option(None, "train on this UTF-8 text, or on data.py's output, instead")
    folder: str = option("data", "where downloads are kept")
    val_fraction: float = option(0.1, "share of the text, at its end, kept for validation")
    tokenizer: Literal["char", "word", "bpe"] = option(
        "char", "one id for each character or word of the whole text, or for each frequent piece "
        "of the training part"
    )
    vocab_size: int = option(1024, "the number of tokens that bpe learns, including 256 bytes")
    repeats: float = option(0.0, "share of the windows that are repeated random tokens")

    def __post_init__(self):
        check_choices(self)
        check_field(self, "repeats", lambda share: 0 <= share < 1, "at least 0 and less than 1")
        check_field(self, "vocab_size", lambda n: n >= 256, "256 or more")
        check_field(self, "val_fraction", lambda share: 0 < share < 1,
                    "more than 0 and less than 1")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model: a pre-LayerNorm GPT-2."""

    n_layers: int = option(3, "blocks; 0 leaves only embedding and unembedding")
    n_heads: int = option(4, "attention heads per block; must divide d_model, unless d_head is set")
    d_model: int = option(80, "width of the residual stream")
    d_head: int | None = option(None, "width of a head's queries, keys and values (none: d_model / "
                                      "n_heads)")
    d_mlp: int | None = option(None, "hidden neurons of an MLP (none: 4 x d_model)")
    n_ctx: int = option(96, "the largest number of tokens that the model reads at once")
    d_vocab: int | None = option(None, "size of the vocabulary (none: the tokenizer's)")
    d_vocab_out: int | None = option(None, "number of logits (none: d_vocab; another number makes "
                                           "a classifier)")
    attn_only: bool = option(False, "leave the MLPs out")
    norm: Literal["layernorm", "none"] = option("layernorm", "normalise what each part reads")
    norm_epsilon: float = option(1e-5, "what LayerNorm adds to the variance")
    activation: Literal["gelu", "gelu_exact", "relu"] = option(
        "gelu", "nonlinearity of the MLP; gelu: GPT-2's, by tanh; gelu_exact: by erf"
    )
    positions: Literal["learned", "sinusoidal", "none"] = option("learned", "position embedding")
    tie_embeddings: bool = option(False, "use the transposed token embedding as the unembedding")
    attn_bias: bool = option(True, "biases on queries, keys, values and the attention output")
    unembed_bias: bool = option(False, "a bias on the logits")
    dropout: float = option(0.0, "share of activations zeroed in training")
    init_scale: float = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self):
        check_choices(self)
        check_field(self, "n_layers", lambda n: n >= 0, "0 or more")
        for name in ("n_heads", "d_model", "n_ctx"):
            check_field(self, name, lambda n: n >= 1, "1 or more")
        for name in ("d_head", "d_mlp", "d_vocab", "d_vocab_out"):
            check_field(self, name, lambda n: n is None or n >= 1, "1 or more")
        check_field(self, "dropout", lambda p: 0 <= p < 1, "at least 0 and less than 1")
        check_field(self, "norm_epsilon", lambda epsilon: 0 <= epsilon <= 1, "from 0 to 1")
        check_field(self, "init_scale", lambda std: 0 < std < INFINITY, "more than 0, and finite")

        self.derive_sizes_()
        if self.tie_embeddings and self.d_vocab_out not in (None, self.d_vocab):
            raise UserError(f"tie_embeddings=True needs as many logits as tokens, and d_vocab_out="
                            f"{self.d_vocab_out} is not d_vocab={self.d_vocab}; leave one of them "
                            "out")

    def derive_sizes_(self):
        """Computes the sizes that are not given from the others.

        It happens once: `dataclasses.replace` with another n_heads, d_model or d_vocab keeps them,
        so it needs d_head=None, d_mlp=None or d_vocab_out=None as well.
        """
        if self.d_head is None:
            self.check_divisor()
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.d_mlp is None:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        if self.d_vocab_out is None:
            object.__setattr__(self, "d_vocab_out", self.d_vocab)

    def check_divisor(self):
        """Raises UserError, with the nearest divisors, unless n_heads divides d_model."""
        if self.d_model % self.n_heads:
            most = min(self.d_model, 100_000)  # enough to suggest a few
            divisors = [n for n in range(1, most + 1) if self.d_model % n == 0]
            nearest = sorted(divisors, key=lambda n: abs(n - self.n_heads))[:3]
            suggested = ", ".join(map(str, sorted(nearest)))
            raise UserError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}; "
                            f"choose a divisor, such as {suggested}, or give d_head")

    @property
    def activation_bytes(self):
        """The bytes that training keeps of each token until the backward pass, in float32.

        Counted are the inputs of products, norms, GELU and attention, and the probabilities of the
        loss. What dropout keeps is not counted.
        """
        norm = 0
        if self.norm == "layernorm":
            norm = self.d_model + 2  # its output, the mean and the variance

        mlp = 0
        if not self.attn_only:
            copies_of_neurons = {"gelu": 3, "gelu_exact": 2, "relu": 1}[self.activation]
            mlp = norm + self.d_model + copies_of_neurons * self.d_mlp

        # The stream, q, k, v and z
        attention = norm + self.d_model + self.n_heads * (4 * self.d_head + 1)
        unembedding = norm + self.d_model + self.d_vocab_out + 2
        numbers = self.n_layers * (attention + mlp) + unembedding
        targets = 10  # bytes: the target ids, and which of them count
        return 4 * numbers + targets


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    init_from: str | None = option(
        None, "begin with this model's weights, shape and tokenizer, instead of random weights: a "
        "run, gpt2, or a model's folder; the optimiser begins anew"
    )
    freeze: tuple[str, ...] = option(
        (), 'weights that stay as they are: patterns of their names, such as "blocks.0.*"; with '
        "tied embeddings, token_embedding.W_E is the unembedding too"
    )
    max_steps: int = option(2850, "optimiser steps in all; with --resume, a larger number "
                                  "trains a finished run longer")
    batch_size: int = option(12, "windows per step, summed over all devices")
    accumulate: int = option(1, "process a device's windows in this many parts, to save memory")
    optimizer: Literal["muon", "adamw"] = option(
        "muon", "muon: Muon on the blocks' matrices, AdamW on the rest; adamw: AdamW on everything"
    )
    lr: float = option(
        5e-3, "AdamW's highest learning rate; to tune a model, about a tenth of the rate that it "
        "was trained with (for GPT-2, 6e-5)"
    )
    muon_lr: float = option(
        0.016, "Muon's highest learning rate; to tune a model, again about a tenth of its own"
    )
    schedule: Literal["linear", "cosine", "trapezoid"] = option("linear", "how the rates fall")
    final_lr_fraction: float = option(0.0, "the schedule ends at this share of the highest rate")
    warmup_steps: int = option(40, "steps over which the rates rise before they fall")
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW's decay per step of the average gradient")
    beta2: float = option(0.98, "AdamW's decay per step of the average squared gradient")
    grad_clip: float = option(1.0, "the largest norm that the gradient may have (0: no limit)")
    eval_interval: int = option(
        500, "steps between checkpoints and evaluations on the whole split; the first come early")
    log_interval: int = option(10, "steps between rows of metrics.jsonl")
    seed: int = option(0, "seed of the initial weights and of the batches")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: Literal["float32", "bfloat16"] = option("float32", "precision of matrix products")
    compile: bool = option(False, "compile the model with torch.compile")
    threads: int | None = option(None, "CPU threads (none: torch's choice, one per core)")

    def __post_init__(self):
        check_choices(self)
        if isinstance(self.freeze, str) or not all(isinstance(part, str) for part in self.freeze):
            raise UserError(f"freeze={self.freeze!r} is not a list of patterns; give "
                            'freeze=("blocks.0.*",), for example')
        object.__setattr__(self, "freeze", tuple(self.freeze))  # JSON has lists only
        for name in ("max_steps", "batch_size", "accumulate", "eval_interval", "log_interval"):
            check_field(self, name, lambda n: n >= 1, "1 or more")
        self.windows_at_once()  # raises if the batch does not divide into parts

        for name in ("warmup_steps", "weight_decay", "grad_clip"):
            check_field(self, name, lambda n: 0 <= n < INFINITY, "0 or more, and finite")
        check_field(self, "seed", *SEEDS)
        for name in ("beta1", "beta2"):
            check_field(self, name, lambda beta: 0 <= beta < 1, "at least 0 and less than 1")
        for name in ("lr", "muon_lr"):
            check_field(self, name, lambda lr: 0 < lr < INFINITY, "more than 0, and finite")
        check_field(self, "final_lr_fraction", lambda share: 0 <= share <= 1, "from 0 to 1")
        check_field(self, "threads", lambda n: n is None or n >= 1, "1 or more")

    def windows_at_once(self, n_ranks=1):
        """The number of windows that each of n_ranks devices processes at once.

        Raises UserError if the batch does not divide into that many parts.
        """
        parts = n_ranks * self.accumulate
        if self.batch_size % parts:
            raise UserError(f"batch_size={self.batch_size} does not divide into {n_ranks} ranks x "
                            f"accumulate={self.accumulate}; choose a multiple of {parts}")
        return self.batch_size // parts


@dataclass(frozen=True)
class LoggingConfig:
    """Where to write."""

    out_dir: str = option("outputs", "the folder of all runs")
    run_name: str | None = option(None, "this run's folder in it (none: the next free number)")

    def __post_init__(self):
        name = self.run_name
        if name is None:
            return
        if not name or set(name) & set("/\\") or name.startswith(".") or not name.isprintable():
            raise UserError(f"run_name={name!r} is not a folder name; leave out /, \\ and line "
                            "ends")


@dataclass(frozen=True)
class SamplingConfig:
    """How many tokens to generate, and how to choose each."""

    max_new_tokens: int | None = option(
        None, "tokens to add (none: 500, or as many as fit into the context)"
    )
    sliding: bool = option(False, "continue beyond the context; the oldest tokens are forgotten")
    greedy: bool = option(False, "always take the most likely token")
    temperature: float = option(0.8, "divides the logits: below 1 more predictable, above 1 wilder")
    top_k: int | None = option(None, "choose among the k most likely tokens")
    top_p: float | None = option(None, "choose among the most likely tokens of total probability p")
    repetition_penalty: float = option(1.0, "above 1: earlier tokens become less likely")
    seed: int = option(0, "seed of the random choices")

    def __post_init__(self):
        check_field(self, "max_new_tokens", lambda n: n is None or n >= 0, "0 or more")
        check_field(self, "temperature", lambda t: 0 < t < INFINITY, "more than 0 (or --greedy)")
        check_field(self, "top_k", lambda k: k is None or k >= 1, "1 or more")
        check_field(self, "top_p", lambda p: p is None or 0 < p <= 1, "more than 0 and at most 1")
        check_field(self, "repetition_penalty", lambda r: 0 < r < INFINITY, "more than 0 (1: none)")
        check_field(self, "seed", *SEEDS)


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """What generate.py writes, and with which model."""

    run_name: str | None = option(None, "a run in out_dir, or a run's folder (none: the newest)")
    model: str | None = option(None, "instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                               "distilgpt2, owner/name of a GPT-2 on the hub, or a folder or file "
                               "of another project's model")
    out_dir: str = option("outputs", "the folder of all runs")
    cache_dir: str | None = option(None, "where downloads are kept (none: below ~/.cache)")
    device: str = option("cpu", "auto, cpu, cuda or mps")
    prompt: str = option("\n", "the text to continue; <|endoftext|> in it is one token, if the "
                               "tokenizer has it")
    stop: str | None = option(None, "end before this text, whatever tokens spell it; "
                                    "<|endoftext|> is one token")
    steer: str | None = option(None, "push the residual stream towards its value after this text")
    steer_away: str | None = option(None, "and away from its value after this text")
    steer_at: str | None = option(
        None, "the hook to push at (none: the middle block's hook_resid_post)"
    )
    steer_scale: float = option(4.0, "size of the push, in differences between the two texts")

    def __post_init__(self):
        super().__post_init__()
        if self.run_name is not None and self.model is not None:
            raise UserError(f"run_name={self.run_name!r} and model={self.model!r} are both given; "
                            "choose one")
        check_field(self, "steer_scale", lambda scale: -INFINITY < scale < INFINITY, "finite")
        for name in ("prompt", "steer", "steer_away", "stop"):
            if getattr(self, name) == "":
                raise UserError(f"{name}='' is empty; give at least one character")


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self):
        if self.data.repeats and not self.n_repeats:
            raise UserError(f"repeats={self.data.repeats} of batch_size={self.train.batch_size} is "
                            f"less than one window; give {1 / self.train.batch_size:.2g} or more")

    @property
    def n_repeats(self):
        """The number of windows in a batch that are repeated random tokens."""
        return round(self.data.repeats * self.train.batch_size)


@functools.cache
def field_types(kind):
    """{name: type} of a dataclass's fields. Python works them out anew each time, slowly."""
    return typing.get_type_hints(kind)


def check_field(config, name, holds, wanted):
    """Raises UserError unless `holds(value)` for that field; no test holds for NaN."""
    value = getattr(config, name)
    hint = field_types(type(config))[name]
    if not is_of_kind(value, hint) or not holds(value):
        raise UserError(f"{name}={value} is not possible; it must be {wanted}")


def is_of_kind(value, hint):
    """Whether a value has a field's type: whole numbers count as floats, booleans not as numbers.
    Types that are neither numbers nor texts are not checked."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if type(None) in kinds and value is None:
        return True
    if int in kinds and as_index(value) is not None:
        return True
    if float in kinds:
        return not isinstance(value, bool) and isinstance(value, numbers.Real)
    return int not in kinds


def check_choices(config):
    """Raises UserError if a field with a fixed set of words (`Literal`) holds another one."""
    for name, hint in field_types(type(config)).items():
        if typing.get_origin(hint) is Literal:
            check_choice(name, getattr(config, name), typing.get_args(hint))


def config_from_dict(kind, values):
    """The dataclass `kind` from nested dicts; raises UserError for an unknown field."""
    hints = field_types(kind)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{kind.__name__} has no field {name!r}{suggest_closest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            value = config_from_dict(hints[name], value)
        fields[name] = value
    return kind(**fields)


# The command line


class FlagParser(argparse.ArgumentParser):
    """argparse with this project's errors: one line, with the closest flag for an unknown one."""

    def parse_args(self, args=None):
        known, unknown = self.parse_known_args(args)
        if not unknown:
            return known
        if not unknown[0].startswith("-"):
            self.refuse_words(list(itertools.takewhile(lambda w: not w.startswith("-"), unknown)))
        flag = unknown[0].split("=")[0]
        closest = suggest_closest(flag, self.settings())
        raise UserError(f"unknown flag {flag}{closest}; --help lists them all")

    def settings(self):
        """All flags but --help, which the errors name anyway and which `--lr` would resemble."""
        return [flag for flag in self._option_string_actions if flag not in ("-h", "--help")]

    def refuse_words(self, words):
        """Raises UserError for words that belong to no flag; a prompt needs `--prompt`."""
        flags = self.settings()
        text = " ".join(words)
        if "--prompt" in flags:
            raise UserError(f'{text} belongs to no flag; for a text to continue, use '
                            f'--prompt "{text}"')
        closest = suggest_closest(f"--{words[0]}", flags)
        raise UserError(f"unknown word {words[0]}{closest}; write flags as --name value; --help "
                        "lists them all")

    def error(self, message):
        raise UserError(f"{message}; --help lists every flag")


def flag_parser(kind, description):
    """A dataclass's command line: one flag per field, `--model.n_layers 2` for a nested one."""
    parser = FlagParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=100),
        usage="%(prog)s [flags]")
    add_flags(parser, kind, prefix="")
    return parser


def add_flags(parser, kind, prefix):
    """Adds a flag for each field of the dataclass `kind`; a nested one becomes a titled group."""
    hints = field_types(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        flag = prefix + item.name
        if dataclasses.is_dataclass(hint):
            group = parser.add_argument_group(item.name, hint.__doc__)
            add_flags(group, hint, prefix=f"{flag}.")
            continue

        parser.add_argument(f"--{flag}", help=help_with_default(item), **argument_settings(hint))


def help_with_default(item):
    """A field's help text with its default. Where the text has "(none: ...)", which says what none
    means, the default joins it in one bracket."""
    text = item.metadata["help"]
    default = item.default
    if default is None and "(none: " in text:
        return text.replace("(none: ", "(default: none, which means ")

    if default == ():
        default = "none"
    elif default is None or isinstance(default, bool):
        default = str(default).lower()  # as one types it
    elif isinstance(default, str) and default.isspace():
        default = repr(default)  # a line end that can be seen
    return f"{text} (default: {default})"


def argument_settings(hint):
    """The keyword arguments of argparse's `add_argument` for a field's type."""
    # One word of a fixed set
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        return {"choices": words, "metavar": "|".join(words)}

    # A switch, given alone or with a value
    if hint is bool:
        return {"type": parse_bool, "nargs": "?", "const": True, "metavar": "true|false"}

    # A number or a text; several of them (`tuple[int, ...]`), or one that may be none
    kind = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
    metavar = {int: "N", float: "X", str: "TEXT"}[kind]
    if typing.get_origin(hint) is tuple:
        return {"action": StoreSeveral, "type": several_parser(kind), "nargs": "+",
                "metavar": metavar}
    if kind is not hint:
        return {"type": optional_parser(kind), "metavar": metavar}
    return {"type": kind, "metavar": metavar}


class StoreSeveral(argparse.Action):
    """Stores the values of a flag that takes several, `--seeds 0 1` or `--seeds 0,1`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(value for word in values for value in word))


def several_parser(kind):
    """A function of a word such as "0" or "0,1": its values, a list."""

    def parse(word):
        return [kind(part) for part in word.split(",") if part]

    parse.__name__ = kind.__name__  # argparse names it where a word is refused
    return parse


def optional_parser(kind):
    """A parser of one word: None for "none", otherwise the word as `kind`."""

    def parse(word):
        return None if word == "none" else kind(word)

    parse.__name__ = kind.__name__  # argparse uses it in its error message
    return parse


def parse_bool(word):
    """A word of the command line as a truth value."""
    values = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return values[word.lower()]


def nest_flags(flags):
    """{"model.n_layers": 2} as {"model": {"n_layers": 2}}, which `config_from_dict` reads.

    "model.preset" stands for all flags of that shape; a flag that is given explicitly wins.
    """
    preset = PRESETS.get(flags.get("model.preset"), {})
    preset_flags = {f"model.{name}": value for name, value in preset.items()}

    nested = {}
    for flag, value in (preset_flags | flags).items():
        if flag == "model.preset":
            continue
        section, _, name = flag.rpartition(".")
        if section:
            nested.setdefault(section, {})[name] = value
        else:
            nested[name] = value
    return nested
