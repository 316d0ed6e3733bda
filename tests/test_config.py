"""Settings, their checks, and the command line that is made from them."""

import dataclasses
import json
import re
import typing
from dataclasses import asdict, is_dataclass
from functools import partial

import pytest
import torch
from helpers import refusal

import config
from config import (
    PRESETS,
    Config,
    DataConfig,
    GenerateConfig,
    LoggingConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    config_from_dict,
    flag_parser,
    nest_flags,
)
from model import GPT


def settings(kind, prefix=""):
    """(flag's name, field, type) of every setting of a config, nested ones included."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if is_dataclass(hints[item.name]):
            yield from settings(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item, hints[item.name]


NAN = float("nan")
INF = float("inf")


def another_value(default, hint):
    """A possible value of that type that is not the default."""
    kinds = set(typing.get_args(hint)) or {hint}
    if typing.get_origin(hint) is tuple:
        return ("other", "another")
    if typing.get_origin(hint) is typing.Literal:
        return next(word for word in typing.get_args(hint) if word != default)
    if bool in kinds:
        return not default
    if int in kinds:
        return 2 * (default or 4)
    return (default or 0.5) / 2 if float in kinds else "other"


def parse(kind, *args):
    return config_from_dict(kind, nest_flags(vars(flag_parser(kind, "A test.").parse_args(args))))


def help_of(kind, capsys):
    with pytest.raises(SystemExit) as end:
        parse(kind, "--help")
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_config_is_reached_by_the_two_programs():
    kinds = {k for k in vars(config).values() if is_dataclass(k)}
    assert kinds == {Config, DataConfig, ModelConfig, TrainConfig, LoggingConfig, SamplingConfig,
                     GenerateConfig}
    assert issubclass(GenerateConfig, SamplingConfig)


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_every_setting_has_a_help_text(kind):
    for name, item, _ in settings(kind):
        assert len(item.metadata["help"]) > 10, f"--{name} is not explained"


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_every_flag_sets_its_own_field_and_no_other(kind):
    for name, item, hint in settings(kind):
        value = another_value(item.default, hint)
        wanted = asdict(kind())
        section, _, leaf = name.rpartition(".")
        (wanted[section] if section else wanted)[leaf] = value
        if section == "model":  # the sizes that follow from it
            n_heads, d_model = wanted["model"]["n_heads"], wanted["model"]["d_model"]
            follow = {"n_heads": {"d_head": d_model // n_heads}, "d_vocab": {"d_vocab_out": value},
                      "d_model": {"d_mlp": 4 * d_model, "d_head": d_model // n_heads}}
            wanted["model"].update(follow.get(leaf, {}))
        word = ",".join(value) if isinstance(value, tuple) else str(value)
        for flags in ([f"--{name}", word], [f"--{name}={word}"]):
            assert asdict(parse(kind, *flags)) == wanted, flags


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_help_names_every_flag_with_its_text_and_its_default_and_ends_well(kind, capsys):
    text = help_of(kind, capsys)
    for name, item, _ in settings(kind):
        explained = " ".join(item.metadata["help"].split()).split("(none: ")  # one bracket with it
        assert f"--{name} " in text and all(part in text for part in explained), (
            f"--help does not explain --{name}")
    assert "(default: 0" in text and "(default: none)" in text


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_no_flags_give_the_defaults(kind):
    assert parse(kind) == kind()


def test_a_switch_takes_a_truth_value_or_none():
    for words, value in [
        (["--model.attn_bias"], True), (["--model.attn_only"], True),
        (["--model.attn_only", "true"], True), (["--model.attn_only", "false"], False),
        (["--model.attn_only=False"], False), (["--model.attn_bias", "no"], False),
        (["--model.attn_only", "yes"], True), (["--model.attn_only", "1"], True),
        (["--model.attn_bias", "0"], False),
    ]:
        name = words[0].split(".")[1].split("=")[0]
        cfg = parse(Config, *words, "--model.n_layers", "1")
        assert getattr(cfg.model, name) is value, words


def test_a_wrong_command_line_is_one_line_with_the_value_or_the_closest_flag():
    for words, *told in [
        (["--model.n_layer", "2"], "--model.n_layer;", "--model.n_layers"),
        (["--n_layers=2"], "--n_layers;", "--model.n_layers"),
        (["--train.max_step", "3"], "--train.max_step;", "--train.max_steps"),
        (["--steps", "3"], "--steps;", "the closest: --train.max_steps"),
        (["stray"], "unknown", "stray"),
        (["model.n_layers", "2"], "unknown", "the closest: --model.n_layers"),
        (["--model.n_layers", "two"], "--model.n_layers", "'two'"),
        (["--model.n_layers", "2.5"], "'2.5'"),
        (["--model.n_layers"], "--model.n_layers", "argument"),
        (["--model.attn_only", "maybe"], "'maybe'"),
        (["--model.norm", "batch"], "'batch'", "layernorm"),
        (["--train.lr", "nan"], "lr=nan"),
        (["--train.lr", "-1"], "lr=-1.0"),
        (["--train.max_steps", "none"], "int", "'none'"),
    ]:
        message = refusal(partial(parse, Config, *words), words)
        assert all(part in message for part in told) and "\n" not in message, message


def test_help_shows_a_default_that_is_a_line_end(capsys):
    assert r"(default: '\n')" in help_of(GenerateConfig, capsys)


def test_a_text_without_a_flag_is_answered_with_the_flag_for_a_prompt():
    for words, command in [
        (["ROMEO:"], '--prompt "ROMEO:"'), (["To", "be", "--greedy"], '--prompt "To be"'),
    ]:
        assert command in refusal(partial(parse, GenerateConfig, *words), words)


# Values


NONSENSE = [
    (DataConfig, "val_fraction", 0.0, 1.0, -0.1, NAN),
    (DataConfig, "repeats", -0.1, 1.0, NAN),
    (DataConfig, "vocab_size", 255),
    (DataConfig, "dataset", "wikipedia"),
    *[(ModelConfig, name, 0, -1) for name in ("n_heads", "d_model", "d_head", "d_mlp", "n_ctx",
                                              "d_vocab", "d_vocab_out")],
    *[(ModelConfig, name, "unknown") for name in ("norm", "activation", "positions")],
    (ModelConfig, "n_layers", -1),
    (ModelConfig, "dropout", 1.0, -0.1, NAN),
    (ModelConfig, "norm_epsilon", -1e-5, 1.1, NAN, INF),
    (ModelConfig, "init_scale", 0.0, -0.02, NAN, INF),
    *[(TrainConfig, name, 0) for name in ("max_steps", "batch_size", "eval_interval",
                                          "log_interval", "threads", "accumulate")],
    *[(TrainConfig, name, 0.0, -1e-3, NAN, INF) for name in ("lr", "muon_lr")],
    *[(TrainConfig, name, -0.1, NAN, INF) for name in ("weight_decay", "grad_clip")],
    (TrainConfig, "freeze", "blocks.*", (3,)),
    (TrainConfig, "seed", -1, 2**63),
    (TrainConfig, "warmup_steps", -1),
    *[(TrainConfig, name, 1.0, -0.1, NAN) for name in ("beta1", "beta2")],
    (TrainConfig, "final_lr_fraction", 1.5, -0.1, NAN),
    (TrainConfig, "precision", "float64"),
    *[(TrainConfig, name, "unknown") for name in ("optimizer", "schedule")],
    (LoggingConfig, "run_name", "", "a/b", "..", ".hidden", "a\\b"),
    (GenerateConfig, "temperature", 0.0, -1.0, NAN, INF),
    (GenerateConfig, "repetition_penalty", 0.0, -1.0, NAN, INF),
    (GenerateConfig, "top_p", 0.0, 1.1, NAN),
    (GenerateConfig, "top_k", 0),
    (GenerateConfig, "max_new_tokens", -1),
    (GenerateConfig, "steer_scale", NAN, INF, -INF),
    *[(GenerateConfig, name, "") for name in ("prompt", "stop", "steer", "steer_away")],
]


def test_a_nonsense_value_is_refused_by_its_name_and_its_value():
    for kind, name, *values in NONSENSE:
        for value in values:
            shown = f"{name}={value!r} is"
            message = refusal(partial(kind, **{name: value}), shown)
            assert message.startswith(shown) and len(message) > len(shown) + 10, message


def test_values_at_the_limits_are_allowed():
    for kind, name, value in [
        (DataConfig, "repeats", 0.0), (DataConfig, "vocab_size", 256),
        (ModelConfig, "n_layers", 0), (ModelConfig, "dropout", 0.0),
        (ModelConfig, "norm_epsilon", 0.0),
        *[(ModelConfig, name, 1) for name in ("n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab",
                                              "d_vocab_out")],
        *[(TrainConfig, name, 1) for name in ("max_steps", "batch_size", "eval_interval",
                                              "log_interval", "threads")],
        *[(TrainConfig, name, 0) for name in ("grad_clip", "warmup_steps", "weight_decay", "beta1",
                                              "beta2", "seed", "final_lr_fraction")],
        (TrainConfig, "final_lr_fraction", 1.0), (TrainConfig, "seed", 2**63 - 1),
        (LoggingConfig, "run_name", "a.b"),
        (GenerateConfig, "max_new_tokens", 0), (GenerateConfig, "top_p", 1.0),
        (GenerateConfig, "top_k", 1), (GenerateConfig, "steer_scale", -1.0),
    ]:
        try:
            assert getattr(kind(**{name: value}), name) == value
        except ValueError as error:
            pytest.fail(f"{name}={value} is refused: {error}")


def test_heads_that_do_not_divide_the_width_are_refused_with_divisors_that_do():
    message = refusal(lambda: ModelConfig(n_heads=5, d_model=128))
    assert "n_heads=5" in message and "d_model=128" in message
    proposed = [int(n) for n in re.findall(r"\d+", message.split("such as ")[1])]
    assert 4 in proposed and 8 in proposed and all(128 % n == 0 for n in proposed)


def test_an_mlp_is_four_times_as_wide_as_the_stream_by_default():
    assert ModelConfig(d_model=48).d_mlp == 192
    assert ModelConfig(d_model=48, d_mlp=7).d_mlp == 7


def test_the_heads_share_the_width_unless_they_have_one_of_their_own():
    assert ModelConfig(d_model=48, n_heads=4).d_head == 12
    assert ModelConfig(d_model=48, n_heads=5, d_head=64).d_head == 64


def test_there_is_a_logit_for_each_token_unless_another_number_is_given():
    assert ModelConfig(d_vocab=65).d_vocab_out == 65
    assert ModelConfig(d_vocab=65, d_vocab_out=2).d_vocab_out == 2
    tied = {"tie_embeddings": True, "d_vocab": 65}
    assert ModelConfig(**tied, d_vocab_out=65).d_vocab_out == 65
    message = refusal(lambda: ModelConfig(**tied, d_vocab_out=2))
    assert "d_vocab_out=2" in message and "d_vocab=65" in message


@pytest.mark.parametrize("kind", [Config, ModelConfig, TrainConfig, GenerateConfig])
def test_a_config_cannot_be_changed(kind):
    cfg = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, dataclasses.fields(kind)[0].name, 1)


def test_a_preset_sets_its_flags_and_given_flags_win():
    wanted = {"model": PRESETS["gpt2"] | {"n_ctx": 64}}
    assert nest_flags({"model.preset": "gpt2", "model.n_ctx": 64}) == wanted
    assert nest_flags({"model.n_ctx": 64, "model.preset": "gpt2"}) == wanted
    assert nest_flags({"model.n_ctx": 64}) == {"model": {"n_ctx": 64}}


def test_the_preset_gpt2_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        assert GPT(ModelConfig(**PRESETS["gpt2"], d_vocab=50257), None).n_parameters == 124_439_808


def test_the_windows_of_a_batch_are_shared_by_ranks_and_parts():
    for accumulate, n_ranks, windows in [(1, 1, 12), (3, 1, 4), (3, 2, 2), (1, 12, 1)]:
        cfg = TrainConfig(batch_size=12, accumulate=accumulate)
        assert cfg.windows_at_once(n_ranks) == windows, (accumulate, n_ranks)


def test_a_batch_that_cannot_be_divided_is_refused_with_sizes_that_can():
    for batch_size, accumulate, n_ranks, multiple in [(12, 3, 8, 24), (10, 2, 3, 6)]:
        cfg = TrainConfig(batch_size=batch_size, accumulate=accumulate)
        message = refusal(partial(cfg.windows_at_once, n_ranks), cfg)
        assert f"batch_size={batch_size}" in message and f"multiple of {multiple}" in message


@pytest.mark.parametrize("cfg", [
    Config(), GenerateConfig(prompt="é\n", top_k=3),
    Config(model=ModelConfig(d_model=8, n_heads=2, d_mlp=5), train=TrainConfig(lr=1e-4, threads=2)),
], ids=["the defaults", "sampling", "a run"])
def test_a_config_survives_dictionaries_and_json(cfg):
    assert config_from_dict(type(cfg), asdict(cfg)) == cfg
    assert config_from_dict(type(cfg), json.loads(json.dumps(asdict(cfg)))) == cfg


def test_a_dictionary_is_checked_like_a_command_line():
    for kind, values, *told in [
        (ModelConfig, {"n_layer": 2}, "ModelConfig", "'n_layer'", "n_layers"),
        (Config, {"train": {"learning": 1}}, "TrainConfig", "'learning'"),
        (Config, {"modle": {}}, "Config", "'modle'", "closest: model"),
        (Config, {"model": {"n_heads": 7}}, "n_heads=7"),
        (Config, {"model": {"n_heads": 7, "d_model": 10**12}}, "such as 4, 5, 8"),
    ]:
        message = refusal(partial(config_from_dict, kind, values), values)
        assert all(part in message for part in told), message


def test_none_on_the_command_line_is_none_where_a_setting_may_be_none():
    assert parse(Config, "--train.threads", "none").train.threads is None
    assert parse(Config, "--data.path", "none").data.path is None


def test_a_run_and_a_published_model_together_are_refused():
    message = refusal(lambda: GenerateConfig(run_name="mine", model="gpt2"))
    assert "'mine'" in message and "'gpt2'" in message


def test_the_number_of_repeats_is_the_nearest_to_their_share():
    for share, n_repeats in [(0.0, 0), (0.1, 1), (0.3, 4), (0.99, 12)]:
        cfg = Config(data=DataConfig(repeats=share), train=TrainConfig(batch_size=12))
        assert cfg.n_repeats == n_repeats, share  # 0.1 x 12 is 1.2, and 0.3 x 12 is 3.6


def test_a_share_of_repeats_below_one_window_is_refused_with_one_that_works():
    message = refusal(lambda: Config(DataConfig(repeats=0.01), train=TrainConfig(batch_size=12)))
    assert "repeats=0.01" in message and "0.083" in message
