"""What experiments share: trained models are kept for the same settings only, and the page of all
experiments says what their tables say."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from helpers import tiny_model, tiny_tokens

import plotting
from checkpoint import load_model
from config import config_from_dict, flag_parser, option
from experiments.common import (
    Claim,
    ExperimentConfig,
    as_run,
    conclude,
    experiment_folder,
    load_or_make,
    over_seeds,
    perform,
    torch_threads,
    write_index,
)
from tokenizer import CharTokenizer
from utils import UserError, read_json

ABOUT = "What it shows.\n\n    python experiments/one.py  # a second\n"
HELD = Claim("a < b", 1.0, 0.5, 1.5, True, control="2")
MISSED = Claim("c", 3.0, 3.0, 3.0, False)


def counted(made):
    """A function that makes a state, and notes that it did."""
    def make():
        made.append(1)
        return {"weights": torch.arange(3.0), "n": len(made)}
    return make


def test_a_trained_model_is_made_once(tmp_path):
    made, path = [], tmp_path / "seed_0" / "checkpoint.pt"
    first = load_or_make(path, {"seed": 0, "seeds": (0, 1)}, counted(made))
    again = load_or_make(path, {"seed": 0, "seeds": (0, 1)}, counted(made))
    assert len(made) == 1 and again["n"] == 1
    assert torch.equal(first["weights"], again["weights"])


@pytest.mark.parametrize("change", ["settings", "retrain", "damage"])
def test_a_trained_model_is_made_anew_where_it_must_be(tmp_path, change):
    made, path = [], tmp_path / "checkpoint.pt"
    load_or_make(path, {"seed": 0}, counted(made))
    if change == "damage":
        path.write_bytes(path.read_bytes()[:100])
    settings = {"seed": 1 if change == "settings" else 0}
    assert load_or_make(path, settings, counted(made), retrain=change == "retrain")["n"] == 2
    assert load_or_make(path, settings, counted(made))["n"] == 2


def test_a_kept_model_is_a_run_that_load_model_reads(tmp_path):
    model, tokenizer = tiny_model(), CharTokenizer().fit("abcdefghijk")
    load_or_make(tmp_path / "seed_0" / "checkpoint.pt", {"seed": 0},
                 lambda: as_run(model, tokenizer))
    loaded, known = load_model(tmp_path / "seed_0")
    assert torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))
    assert known.decode([0, 1]) == "ab"


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out_dir"):
        experiment_folder("name", tmp_path / "file")


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_several_seeds_are_one_flag():
    parser = flag_parser(ExperimentConfig, "")
    assert config_from_dict(ExperimentConfig, vars(parser.parse_args([]))).seeds == (0, 1, 2)
    given = vars(parser.parse_args(["--seeds", "3", "4", "--quick"]))
    assert list(config_from_dict(ExperimentConfig, given).seeds) == [3, 4]


@pytest.mark.parametrize("seeds", [["-1"], ["1.5"], [], ["1", "1"], [str(2**63)]])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(UserError):
        given = flag_parser(ExperimentConfig, "").parse_args(["--seeds", *seeds])
        config_from_dict(ExperimentConfig, vars(given))


@pytest.mark.parametrize(("claims", "code"), [([HELD], 0), ([HELD, MISSED], 1)])
def test_a_missed_claim_is_the_exit_code(tmp_path, capsys, claims, code):
    figure = plotting.curve({"": ([0, 1], [0, 1])}, title="", xlabel="", ylabel="")
    with pytest.raises(SystemExit) as exit:
        conclude({"claims": claims}, tmp_path / "one", {"line": figure})
    assert exit.value.code == code
    assert (tmp_path / "one" / "line.png").read_bytes()[1:4] == b"PNG"
    assert "a < b" in capsys.readouterr().out
    assert [claim["verdict"] for claim in read_json(tmp_path / "one" / "results.json")["claims"]] \
        == ["PASS", "FAIL"][:len(claims)]


def test_a_claim_over_seeds_is_their_mean_and_range_and_holds_where_each_one_does():
    for holds, verdict in ((None, None), (lambda x: x < 4, True), (lambda x: x < 3, False),
                           (True, True)):
        claim = over_seeds("it", [1.0, 2.0, 3.0], holds, control="4")
        assert (claim.measured, claim.low, claim.high, claim.holds) == (2.0, 1.0, 3.0, verdict)
        assert claim.control == "4"


def test_two_other_models_at_once_and_one_that_is_not_there_are_refused(tmp_path):
    @dataclass(frozen=True)
    class LookConfig(ExperimentConfig):
        run_name: str | None = option(None, "a run")
        model: str | None = option(None, "a model")

    with pytest.raises(UserError, match="both given"):
        LookConfig(run_name="mine", model="gpt2")
    with pytest.raises(UserError, match="no run 'mine'"):
        LookConfig(run_name="mine", out_dir=str(tmp_path))
    assert LookConfig(model="gpt2").folder_suffix == "_gpt2"
    assert LookConfig(model="../some/gpt2/").folder_suffix == "_some_gpt2"
    assert LookConfig().folder_suffix == ""


def test_the_page_shows_every_table_and_figure_and_loads_nothing_from_elsewhere(tmp_path):
    for name in ("one", "two"):
        with pytest.raises(SystemExit):
            conclude({"claims": [HELD], "about": f"about {name}"}, tmp_path / name)
    (tmp_path / "two" / "more.html").write_text("")
    (tmp_path / "two" / "a.png").write_bytes(b"")
    (tmp_path / "a_run").mkdir()  # of train.py, without results
    write_index(tmp_path)
    page = (tmp_path / "index.html").read_text()
    for text in ("<h2>one</h2>", "about two", "a &lt; b", "PASS", 'src="two/a.png"',
                 'href="two/more.html"'):
        assert text in page
    assert "a_run" not in page and "//" not in page.replace("<!doctype", "")


def test_a_program_runs_and_ends_with_what_came_out(tmp_path, capsys):
    @dataclass(frozen=True)
    class OneConfig(ExperimentConfig):
        more: float = option(1.0, "of it")

    def run(cfg, folder):
        assert folder == tmp_path / "one" and torch.get_num_threads() == cfg.threads
        return {"claims": [Claim("it", cfg.more, math.nan, math.nan, True)]}

    with pytest.raises(SystemExit) as exit:
        perform(OneConfig, run, lambda result: {}, ABOUT,
                argv=["--more", "2", "--out_dir", str(tmp_path)])
    assert exit.value.code == 0
    results = read_json(tmp_path / "one" / "results.json")
    assert results["claims"][0]["measured"] == 2 == results["settings"]["more"]
    assert results["about"] == "What it shows."
    assert "2" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "there"), [
    ('{"anything": 1}', True), ('{"claims": [{"claim": 1}]}', False), ('{"claims": 3}', False),
    ('{"claims": [{"claim": 1, "measured": 1, "low": 1, "high": 2}]}', False), ('{"cla', False)])
def test_results_of_another_make_are_no_obstacle(tmp_path, capsys, text, there):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(text)
    with pytest.raises(SystemExit) as exit:
        conclude({"claims": [HELD]}, tmp_path / "mine")
    page = (tmp_path / "index.html").read_text()
    assert exit.value.code == 0 and "<h2>mine" in page and ("<h2>other" in page) == there
    assert ("other" in capsys.readouterr().err) != there


@pytest.mark.parametrize("written", [False, True])
def test_a_folder_that_nothing_came_into_is_not_left(tmp_path, written):
    def run(cfg, folder):
        if written:
            (folder / "checkpoint.pt").write_bytes(b"1")
        raise UserError("no heads; choose another")

    with pytest.raises(UserError, match="no heads"):
        perform(ExperimentConfig, run, lambda result: {}, ABOUT, argv=["--out_dir", str(tmp_path)])
    assert (tmp_path / "one").exists() == written


def test_what_is_never_reached_is_null_in_the_file_and_a_dash_on_the_page(tmp_path, capsys):
    never = over_seeds("reached at step", [3.0, math.inf], False)
    with pytest.raises(SystemExit):
        conclude({"claims": [never], "when": {"b": [math.nan, 1]}, "n": (2,)}, tmp_path / "one")
    text = (tmp_path / "one" / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN, Infinity
    assert results["claims"][0]["high"] is None and results["claims"][0]["low"] == 3
    assert results["when"] == {"b": [None, 1]} and results["n"] == [2]
    assert "3 to inf" in capsys.readouterr().out
    assert "3 to —" in (tmp_path / "index.html").read_text()
