"""Settings, their checks, and the command line that is made from them."""

import dataclasses
import json
import typing
from dataclasses import asdict, is_dataclass

import pytest
import torch

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
from utils import UserError


def settings(kind, prefix=""):
    """(flag's name, field, type) of every setting of a config, nested ones included."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if is_dataclass(hints[item.name]):
            yield from settings(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item, hints[item.name]


ALL = [(kind, *setting) for kind in (Config, GenerateConfig) for setting in settings(kind)]
each_setting = pytest.mark.parametrize(
    ("kind", "name", "item", "hint"), ALL, ids=[f"{kind.__name__}-{name}" for kind, name, *_ in ALL]
)


def another_value(default, hint):
    """A possible value of that type that is not the default."""
    kinds = set(typing.get_args(hint)) or {hint}
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


@each_setting
def test_every_setting_has_a_help_text(kind, name, item, hint):
    assert len(item.metadata["help"]) > 10


@each_setting
def test_every_flag_sets_its_own_field_and_no_other(kind, name, item, hint):
    value, wanted = another_value(item.default, hint), asdict(kind())
    section, _, leaf = name.rpartition(".")
    (wanted[section] if section else wanted)[leaf] = value
    if name == "model.d_model":
        wanted["model"]["d_mlp"] = 4 * value
    assert asdict(parse(kind, f"--{name}", str(value))) == wanted
    assert asdict(parse(kind, f"--{name}={value}")) == wanted


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_help_names_every_flag_with_its_text_and_its_default_and_ends_well(kind, capsys):
    text = help_of(kind, capsys)
    for name, item, _ in settings(kind):
        assert f"--{name} " in text and " ".join(item.metadata["help"].split()) in text
    assert "(default: 0" in text and "(default: none)" in text


@pytest.mark.parametrize("kind", [Config, GenerateConfig])
def test_no_flags_give_the_defaults(kind):
    assert parse(kind) == kind()


@pytest.mark.parametrize(("args", "value"), [
    (["--model.attn_only"], True), (["--model.attn_only", "true"], True),
    (["--model.attn_only", "false"], False), (["--model.attn_only=False"], False),
    (["--model.attn_bias", "no"], False), (["--model.attn_bias"], True),
])
def test_a_switch_takes_a_truth_value_or_none(args, value):
    name = args[0].split(".")[1].split("=")[0]
    assert getattr(parse(Config, *args, "--model.n_layers", "1").model, name) is value


@pytest.mark.parametrize(("args", "message"), [
    (["--model.n_layer", "2"], r"unknown flag --model\.n_layer; .*--model\.n_layers"),
    (["--n_layers=2"], r"unknown flag --n_layers; .*--model\.n_layers"),
    (["--train.max_step", "3"], r"unknown flag --train\.max_step; .*--train\.max_steps"),
    (["stray"], "unknown flag stray"),
    (["--model.n_layers", "two"], r"--model\.n_layers.*'two'"),
    (["--model.n_layers", "2.5"], "'2.5'"),
    (["--model.n_layers"], r"--model\.n_layers.*expected one argument"),
    (["--model.attn_only", "maybe"], "'maybe' is neither true nor false"),
    (["--model.norm", "batch"], "'batch'.*layernorm"),
    (["--train.lr", "nan"], "lr=nan is not possible"),
    (["--train.lr", "-1"], "lr=-1.0 is not possible"),
])
def test_a_wrong_command_line_is_a_user_error_with_the_value_or_the_closest_flag(args, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(Config, *args)
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")
NONSENSE = [
    *[(DataConfig, "val_fraction", v) for v in (0.0, 1.0, -0.1, NAN)],
    (DataConfig, "dataset", "wikipedia"),
    *[(ModelConfig, name, v) for name in ("n_heads", "d_model", "d_mlp", "n_ctx", "d_vocab")
      for v in (0, -1)],
    *[(ModelConfig, name, "unknown") for name in ("norm", "activation", "positions")],
    (ModelConfig, "n_layers", -1),
    *[(ModelConfig, "dropout", v) for v in (1.0, -0.1, NAN)],
    *[(ModelConfig, "init_scale", v) for v in (0.0, -0.02, NAN)],
    *[(TrainConfig, name, 0) for name in ("max_steps", "batch_size", "eval_interval",
                                          "log_interval", "threads")],
    *[(TrainConfig, name, v) for name in ("lr", "muon_lr") for v in (0.0, -1e-3, NAN, INF)],
    *[(TrainConfig, name, v) for name in ("weight_decay", "grad_clip") for v in (-0.1, NAN)],
    *[(TrainConfig, name, -1) for name in ("seed", "warmup_steps")],
    *[(TrainConfig, name, v) for name in ("beta1", "beta2") for v in (1.0, -0.1, NAN)],
    *[(TrainConfig, "final_lr_fraction", v) for v in (1.5, -0.1, NAN)],
    (TrainConfig, "accumulate", 0), (TrainConfig, "precision", "float64"),
    *[(TrainConfig, name, "unknown") for name in ("optimizer", "schedule")],
    *[(LoggingConfig, "run_name", v) for v in ("", "a/b", "..", ".hidden", "a\\b")],
    *[(GenerateConfig, "temperature", v) for v in (0.0, -1.0, NAN, INF)],
    *[(GenerateConfig, "top_p", v) for v in (0.0, 1.1, NAN)],
    (GenerateConfig, "top_k", 0), (GenerateConfig, "max_new_tokens", -1),
    (GenerateConfig, "prompt", ""),
]


@pytest.mark.parametrize(("kind", "name", "value"), NONSENSE)
def test_a_nonsense_value_is_a_user_error_that_states_it(kind, name, value):
    with pytest.raises(UserError) as caught:
        kind(**{name: value})
    shown = f"{name}={value!r} is"
    assert str(caught.value).startswith(shown) and len(str(caught.value)) > len(shown) + 10


@pytest.mark.parametrize(("kind", "name", "value"), [
    (ModelConfig, "n_layers", 0), (ModelConfig, "dropout", 0.0), (TrainConfig, "grad_clip", 0.0),
    (TrainConfig, "warmup_steps", 0), (TrainConfig, "final_lr_fraction", 1.0),
    (GenerateConfig, "max_new_tokens", 0), (GenerateConfig, "top_p", 1.0),
    (GenerateConfig, "top_k", 1),
])
def test_values_at_the_border_are_possible(kind, name, value):
    assert getattr(kind(**{name: value}), name) == value


def test_heads_that_do_not_divide_the_width_are_refused_with_divisors_that_do():
    with pytest.raises(UserError, match="n_heads=5 does not divide d_model=128") as caught:
        ModelConfig(n_heads=5, d_model=128)
    proposed = [int(n) for n in str(caught.value).split("such as ")[1].split(",")]
    assert 4 in proposed and 8 in proposed and all(128 % n == 0 for n in proposed)


def test_an_mlp_is_four_times_as_wide_as_the_stream_unless_given():
    assert ModelConfig(d_model=48).d_mlp == 192
    assert ModelConfig(d_model=48, d_mlp=7).d_mlp == 7


def test_the_heads_share_the_width():
    assert ModelConfig(d_model=48, n_heads=4).d_head == 12


@pytest.mark.parametrize("kind", [Config, ModelConfig, TrainConfig, GenerateConfig])
def test_a_config_cannot_be_changed(kind):
    cfg = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, dataclasses.fields(kind)[0].name, 1)


@pytest.mark.parametrize("flags", [
    {"model.preset": "gpt2", "model.n_ctx": 64}, {"model.n_ctx": 64, "model.preset": "gpt2"}])
def test_a_preset_stands_for_its_flags_and_those_given_win(flags):
    assert nest_flags(flags) == {"model": PRESETS["gpt2"] | {"n_ctx": 64}}
    assert nest_flags({"model.n_ctx": 64}) == {"model": {"n_ctx": 64}}


def test_the_preset_gpt2_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        assert GPT(ModelConfig(**PRESETS["gpt2"], d_vocab=50257), None).n_parameters == 124_439_808


@pytest.mark.parametrize(("batch_size", "accumulate", "n_ranks", "windows"), [
    (12, 1, 1, 12), (12, 3, 1, 4), (12, 3, 2, 2), (12, 1, 12, 1)])
def test_the_windows_of_a_batch_are_shared_by_ranks_and_parts(batch_size, accumulate, n_ranks,
                                                              windows):
    cfg = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    assert cfg.windows_at_once(n_ranks) == windows


@pytest.mark.parametrize(("batch_size", "accumulate", "n_ranks"), [(12, 3, 8), (10, 2, 3)])
def test_windows_that_cannot_be_shared_are_refused_with_what_could(batch_size, accumulate, n_ranks):
    cfg = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UserError, match=f"choose a multiple of {n_ranks * accumulate}"):
        cfg.windows_at_once(n_ranks)


@pytest.mark.parametrize("cfg", [
    Config(), GenerateConfig(prompt="é\n", top_k=3),
    Config(model=ModelConfig(d_model=8, n_heads=2, d_mlp=5), train=TrainConfig(lr=1e-4, threads=2)),
])
def test_a_config_survives_dictionaries_and_json(cfg):
    assert config_from_dict(type(cfg), asdict(cfg)) == cfg
    assert config_from_dict(type(cfg), json.loads(json.dumps(asdict(cfg)))) == cfg


@pytest.mark.parametrize(("kind", "values", "message"), [
    (ModelConfig, {"n_layer": 2}, "ModelConfig has no field 'n_layer'; .*n_layers"),
    (Config, {"train": {"learning": 1}}, "TrainConfig has no field 'learning'"),
    (Config, {"modle": {}}, "Config has no field 'modle'; the closest: model"),
    (Config, {"model": {"n_heads": 7}}, "n_heads=7 does not divide"),
])
def test_a_dictionary_is_checked_like_a_command_line(kind, values, message):
    with pytest.raises(UserError, match=message):
        config_from_dict(kind, values)


def test_none_on_the_command_line_is_none_where_a_setting_may_be_none():
    assert parse(Config, "--train.threads", "none").train.threads is None
    assert parse(Config, "--data.path", "none").data.path is None
    with pytest.raises(UserError, match="invalid int value: 'none'"):
        parse(Config, "--train.max_steps", "none")


@pytest.mark.parametrize(("share", "n_repeats"), [(0.0, 0), (0.1, 1), (0.3, 4), (0.99, 12)])
def test_the_number_of_repeats_is_the_nearest_to_their_share(share, n_repeats):
    cfg = Config(data=DataConfig(repeats=share), train=TrainConfig(batch_size=12))
    assert cfg.n_repeats == n_repeats  # 0.1 x 12 is 1.2, and 0.3 x 12 is 3.6
