"""The parts that experiments share: claims are judged by the threshold that they show, models are
kept only for the same settings, and the page of all experiments has their tables."""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import TINY, tiny_model, tiny_tokens
from matplotlib.figure import Figure

import plotting
import train
from checkpoint import load_model
from config import ModelConfig, TrainConfig, config_from_dict, flag_parser, option
from experiments.common import (
    WIDTH,
    Claim,
    ExperimentConfig,
    LabConfig,
    Trainings,
    as_run,
    claim,
    claims_table,
    code_digest,
    conclude,
    correct_for_many,
    experiment_folder,
    fit_with_progress,
    load_or_make,
    perform,
    shape_settings,
    torch_threads,
    trained_gpt,
    validation_tokens,
    write_index,
)
from model import GPT
from tokenizer import CharTokenizer
from utils import UserError, read_json, write_json

ABOUT = "What it shows.\n\n    python experiments/one.py  # a second\n"
HELD = Claim("a < b", 1.0, 0.5, 1.5, True, control="2")
MISSED = Claim("c", 3.0, 3.0, 3.0, False)


# Claims


def test_p_values_of_one_table_are_corrected_for_their_number():
    """0.03 is small for one test, and not for two."""
    alone = claim("a", 1.0, p=0.03)
    assert alone.holds is True and claim("a", 1.0, p=0.06).holds is False
    assert correct_for_many([alone, claim("b", 1.0)]) == [alone, claim("b", 1.0)]

    lines = [claim("a", 1.0, p=0.03, control="chance"), claim("b", 1.0, p=0.001),
             claim("c", 1.0, p=0.9, judged=False), claim("d", [1.0, 2.0], above=0)]
    first, second, open_line, other = correct_for_many(lines)
    assert first.p == pytest.approx(0.03) and first.holds is True  # the last of two
    assert second.p == pytest.approx(0.002) and second.holds is True
    assert first.control == "chance; corrected for 2 tests: p = 0.03"
    assert open_line.holds is None and open_line.p == 0.9 and other is lines[3]

    both = correct_for_many([claim("a", 1.0, p=0.03), claim("b", 1.0, p=0.03)])
    assert [line.holds for line in both] == [False, False]
    missed = correct_for_many([claim("a", 1.0, p=0.001, above=2), claim("b", 1.0, p=0.001)])
    assert [line.holds for line in missed] == [False, True]  # a threshold must hold as well


def test_a_threshold_is_strict_and_a_range_holds_its_ends():
    cases = [
        ({"above": 2.0}, [2.1, 3.0], True), ({"above": 2.0}, [2.0, 3.0], False),
        ({"below": 2.0}, [1.0, 1.9], True), ({"below": 2.0}, [1.0, 2.0], False),
        ({"between": (1.0, 2.0)}, [1.0, 2.0], True), ({"between": (1.0, 2.0)}, [1.5, 2.1], False),
        ({"between": (1.0, 2.0)}, [0.9, 1.5], False), ({"between": (0.0, 0.0)}, 0.0, True),
        ({"above": 1.0, "below": 2.0}, 1.5, True), ({"above": 1.0, "below": 2.0}, 2.5, False),
        ({"above": 1.0, "below": 2.0}, 0.5, False), ({}, 1.0, None)]
    for threshold, values, verdict in cases:
        assert claim("it", values, **threshold).holds is verdict, (threshold, values)


def test_a_line_shows_the_mean_and_the_range_or_the_interval_it_was_given():
    for values in ([0.1, 0.2, 0.6], torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)):
        line = claim("it", values, reported="0.4 (A 2020)", control="chance 0.5", mark=7.0)
        assert (line.measured, line.low, line.high) == (0.3, 0.1, 0.6)  # to the last bit
        assert (line.reported, line.control, line.mark) == ("0.4 (A 2020)", "chance 0.5", 7.0)
    line = claim("it", 0.3, interval=(0.0, 0.9))
    assert (line.measured, line.low, line.high) == (0.3, 0.0, 0.9)


def test_a_claim_has_its_threshold_as_control_unless_another_is_given():
    cases = [
        ({"above": 0.25}, "above 0.25", 0.25), ({"below": 3}, "below 3", 3),
        ({"above": 1, "below": 2}, "above 1 and below 2", 1),
        ({"between": (1, 2)}, "1 to 2", 2), ({"between": (4, 4)}, "4", 4),
        ({"below": 3, "control": "chance"}, "chance", 3), ({"below": 3, "mark": 5}, "below 3", 5),
        ({"holds": True}, "", None)]
    for given, control, mark in cases:
        line = claim("it", 1.5, **given)
        assert (line.control, line.mark) == (control, mark), given


def test_a_number_that_is_none_passes_no_threshold_though_the_median_may_not_show_it():
    for values in ([math.nan, 0.9, 0.9], [0.9, 0.9, math.nan]):
        assert claim("it", values, above=0.8, median=True).holds is False, values


def test_only_the_median_is_judged_if_it_is_asked_for():
    values = [1.0, 2.0, 9.0]
    line = claim("it", values, below=3, median=True)
    assert (line.measured, line.low, line.high, line.holds) == (2.0, 1.0, 9.0, True)
    assert claim("it", values, below=3).holds is False  # 9 is not below
    assert claim("it", values, above=2, median=True).holds is False


def test_a_given_verdict_and_a_threshold_must_both_hold():
    for holds, below in itertools.product((None, True, False), (None, 1.0, 2.0)):
        line = claim("it", 1.5, holds=holds, below=below)
        tests = [test for test in (holds, None if below is None else below > 1.5)
                 if test is not None]
        assert line.holds is (all(tests) if tests else None), (holds, below)


def test_a_claim_that_is_not_judged_has_no_verdict_and_keeps_its_mark():
    for holds in (None, True, False):
        line = claim("it", 1.5, above=2, holds=holds, judged=False)
        assert (line.holds, line.verdict, line.mark) == (None, "", 2)


def test_a_table_fits_the_width_and_loses_no_word():
    words = "a rather long text that says in many words what was claimed of it, and of whom".split()
    long = " ".join(words)
    claims = [Claim(long, 0.123, -0.000123, 0.000456, True, reported=long, control=long), HELD]
    lines = claims_table(claims).splitlines()
    assert {len(line) for line in lines} == {WIDTH}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first = next(index for index, row in enumerate(cells) if row[0].startswith("a rather"))
    second = next(index for index, row in enumerate(cells) if row[0] == "a < b")
    for column in (0, 1, 4):
        assert " ".join(filter(None, (row[column] for row in cells[first:second]))) == long
    assert cells[first][2] == "0.123" and "PASS" in cells[first]  # numbers stand in one line
    # One sees where a row begins: what goes on is indented.
    assert lines[first].startswith("| a") and lines[first + 1].startswith("|   ")


def test_a_table_that_fits_has_a_line_a_claim_and_no_empty_column():
    lines = claims_table([HELD, MISSED]).splitlines()
    assert len(lines) == 4 and "published" not in lines[0]
    assert lines[2].split("|")[1].strip() == "a < b" and max(map(len, lines)) < WIDTH


def test_one_value_has_no_range_and_a_table_of_such_has_no_such_column():
    for values, kind, shown in (
            ([0.3], {}, ""), ([0.3, 0.3], {}, ""), ([0.2, 0.4], {}, "0.2 to 0.4"),
            ([math.nan], {}, ""), ([0.3], {"interval": (0.1, 0.5)}, "0.1 to 0.5"),
            ([0.3], {"interval": (0.3, 0.5)}, "0.3 to 0.5"), ([1.0, math.inf], {}, "1 to inf")):
        line = claim("it", values, **kind)
        assert line.cells()[3] == shown, (values, kind)
    table = claims_table([claim("it", 0.3), claim("more", 2)])
    assert "range" not in table and "0.3 to" not in table
    assert "range" in claims_table([claim("it", [0.3, 0.4]), claim("more", 2)])


# Models that are kept


def counted(made):
    """A function that makes a state, and notes that it did."""
    def make():
        made.append(1)
        return {"weights": torch.arange(3.0), "n": len(made)}
    return make


def test_a_trained_model_is_made_once(tmp_path):
    made = []
    path = tmp_path / "seed_0" / "checkpoint.pt"
    first = load_or_make(path, {"seed": 0, "seeds": (0, 1)}, counted(made))
    again = load_or_make(path, {"seed": 0, "seeds": (0, 1)}, counted(made))
    assert len(made) == 1 and again["n"] == 1
    assert torch.equal(first["weights"], again["weights"])


@pytest.mark.parametrize("change", ["settings", "retrain", "damage"])
def test_a_kept_model_is_trained_again_if_it_must_be(tmp_path, change):
    made = []
    path = tmp_path / "checkpoint.pt"
    load_or_make(path, {"seed": 0}, counted(made))
    if change == "damage":
        path.write_bytes(path.read_bytes()[:100])
    settings = {"seed": 1 if change == "settings" else 0}
    assert load_or_make(path, settings, counted(made), retrain=change == "retrain")["n"] == 2
    assert load_or_make(path, settings, counted(made))["n"] == 2


def test_the_settings_of_a_kept_model_name_a_later_field_only_where_it_is_not_at_its_default():
    later = {"d_head", "d_vocab_out", "norm_epsilon"}
    plain = shape_settings(ModelConfig(d_vocab=65))
    assert not later & plain.keys() and plain["d_model"] == 80
    for name, value in (("d_head", 5), ("d_vocab_out", 3), ("norm_epsilon", 0.1)):
        changed = shape_settings(ModelConfig(d_vocab=65, **{name: value}))
        assert changed == plain | {name: value}


def test_the_digest_changes_with_any_module_and_with_nothing_else(tmp_path):
    (tmp_path / "experiments" / "study").mkdir(parents=True)
    modules = [tmp_path / name for name in ("a.py", "experiments/b.py", "experiments/study/c.py")]
    for module in modules:
        module.write_text("x = 1\n")
    digests = [code_digest(tmp_path)]
    (tmp_path / "notes.md").write_text("x")
    assert code_digest(tmp_path) == digests[0]
    for module in modules:
        module.write_text("x = 2\n")
        digests.append(code_digest(tmp_path))
    modules[0].rename(tmp_path / "d.py")
    digests.append(code_digest(tmp_path))
    assert len(set(digests)) == 5


def test_a_kept_model_is_a_run_that_load_model_reads(tmp_path):
    model, tokenizer = tiny_model(), CharTokenizer().fit("abcdefghijk")
    load_or_make(tmp_path / "seed_0" / "checkpoint.pt", {"seed": 0},
                 lambda: as_run(model, tokenizer))
    loaded, known = load_model(tmp_path / "seed_0")
    assert torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))
    assert known.decode([0, 1]) == "ab"


def test_a_gpt_is_trained_once_for_a_shape_a_seed_and_settings(tmp_path):
    cfg = ModelConfig(**TINY)
    trained = []

    def train_(model):
        trained.append(model)
        with torch.no_grad():
            model.W_E.add_(1.0)
        return {"loss": 0.5}

    def make(cfg=cfg, seed=3, settings=None, **more):
        return trained_gpt(tmp_path / "seed" / "checkpoint.pt", cfg, seed, train_,
                           tokenizer=CharTokenizer().fit("abcdefghijk"),
                           settings=settings or {"steps": 1}, **more)

    model, state = make()
    with torch.no_grad():
        expected = GPT(cfg, seed=3).W_E + 1.0
    assert torch.equal(model.W_E, expected) and state["loss"] == 0.5 and not model.training
    again, kept = make()
    assert len(trained) == 1 and torch.equal(again.W_E, expected) and kept["loss"] == 0.5
    loaded, tokenizer = load_model(tmp_path / "seed")
    assert torch.equal(loaded.W_E, expected) and tokenizer.decode([1]) == "b"

    wider = ModelConfig(**TINY | {"d_mlp": 7})
    for changes in ({"seed": 4}, {"settings": {"steps": 2}}, {"cfg": wider}, {"retrain": True}):
        make()
        before = len(trained)
        make(**changes)
        assert len(trained) == before + 1, changes


def test_a_model_is_trained_in_place_by_the_loss_that_was_given(capsys):
    model = tiny_model()
    before = model.W_E.clone()
    asked = []

    def next_batch():
        asked.append(1)
        return tiny_tokens(), tiny_tokens(seed=3)

    def loss_fn(logits, targets):
        return 1000 + logits.square().mean()

    fit_with_progress(model, next_batch, TrainConfig(max_steps=3), "seed 0", loss_fn=loss_fn)
    assert len(asked) == 3 and not torch.equal(model.W_E, before)
    assert "3/3 steps  seed 0: loss 100" in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch):
    """A list whose last number is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[-1])
    return now


def test_trainings_are_numbered_and_the_time_left_is_for_all_of_them(clock, capsys):
    trainings = Trainings([4, 4, 10])
    for label in ("one", "two"):
        clock.append(clock[-1] + 1000)  # measuring takes time, which is no training
        trainings.begin(label)
        for step in range(1, 5):
            clock.append(clock[-1] + 20.0)  # a log gets a line every ten seconds
            trainings.show(step, "loss 1")
        trainings.close()
        trainings.count()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1/18 steps  training 1 of 3: one: loss 1  340 s left"
    assert lines[-1] == "8/18 steps  training 2 of 3: two: loss 1  200 s left"


def test_a_kept_model_is_one_of_the_trainings_and_takes_no_time(clock, capsys):
    trainings = Trainings([4, 4])
    trainings.count()
    trainings.begin("two")
    clock.append(30.0)
    trainings.show(1)
    assert capsys.readouterr().err.splitlines() == [
        "5/8 steps  training 2 of 2: two  90 s left"]


def test_models_that_are_read_are_counted_like_trained_ones(tmp_path, capsys):
    cfg = ModelConfig(**TINY)

    def make(seed, trainings):
        def train_(model):
            fit_with_progress(model, lambda: (tiny_tokens(), tiny_tokens(seed=3)),
                              TrainConfig(max_steps=2), f"seed {seed}", trainings=trainings)
        trained_gpt(tmp_path / f"{seed}.pt", cfg, seed, train_, settings={},
                    tokenizer=CharTokenizer().fit("abcdefghijk"), trainings=trainings)

    make(0, Trainings([2]))
    assert "2/2 steps  seed 0: loss" in capsys.readouterr().err  # a single one has no number
    trainings = Trainings([2, 2])
    for seed in (0, 1):
        make(seed, trainings)
    assert "4/4 steps  training 2 of 2: seed 1: loss" in capsys.readouterr().err


def test_the_validation_tokens_are_those_that_the_run_was_validated_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 40)
    train.main(["--data.path", str(text), "--data.val_fraction", "0.2", "--model.n_layers", "1",
                "--model.n_heads", "1", "--model.d_model", "8", "--model.n_ctx", "8",
                "--train.max_steps", "1", "--logging.out_dir", str(tmp_path),
                "--logging.run_name", "mine"])
    tokenizer = load_model(tmp_path / "mine")[1]
    assert tokenizer.decode(validation_tokens(tmp_path / "mine").tolist()) == "abcdefghij" * 8

    text.write_text("jihgfedcba" * 40)
    with pytest.raises(UserError, match=r"not the one that .*mine was trained on"):
        validation_tokens(tmp_path / "mine")


def test_a_run_without_the_name_of_its_text_has_no_validation_tokens(tmp_path):
    trained_gpt(tmp_path / "checkpoint.pt", ModelConfig(**TINY), 0, lambda model: None,
                tokenizer=CharTokenizer().fit("abc"), settings={})
    with pytest.raises(UserError, match="does not say what text"):
        validation_tokens(tmp_path)


# The program and the page


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out_dir"):
        experiment_folder("name", tmp_path / "file")


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_several_seeds_are_one_flag():
    parser = flag_parser(ExperimentConfig, "")
    assert config_from_dict(ExperimentConfig, vars(parser.parse_args([]))).seeds == (0, 1, 2)
    for words in (["3", "4"], ["3,4"], ["3,", "4"]):
        given = vars(parser.parse_args(["--seeds", *words, "--quick"]))
        assert list(config_from_dict(ExperimentConfig, given).seeds) == [3, 4], words


@pytest.mark.parametrize("seeds", [["-1"], ["1.5"], [], ["1", "1"], ["1,1"], [","], ["0;1"],
                                   [str(2**63)]])
def test_wrong_seeds_are_refused(seeds):
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
    assert [line["verdict"] for line in read_json(tmp_path / "one" / "results.json")["claims"]] \
        == ["PASS", "FAIL"][:len(claims)]


def test_two_models_together_and_a_missing_one_are_refused(tmp_path):
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


def test_the_summary_is_before_the_table_and_on_the_page(tmp_path, capsys):
    found = "The head 0 < 1 is needed. " + "So many words are said of it. " * 6
    with pytest.raises(SystemExit):
        conclude({"claims": [HELD], "found": found}, tmp_path / "one")
    printed = capsys.readouterr().out
    before, after = printed.split("| claim")
    assert before.split() == found.split() and max(map(len, before.split("\n"))) <= WIDTH
    *table, written, page = after.strip().split("\n")
    assert page == f"open {tmp_path}/index.html" and "PASS" in "".join(table)
    assert written == f"written to {tmp_path}/one"
    assert read_json(tmp_path / "one" / "results.json")["found"] == found
    assert "<p>The head 0 &lt; 1 is needed." in (tmp_path / "index.html").read_text()

    (tmp_path / "one" / "more.html").write_text("")
    with pytest.raises(SystemExit):
        conclude({"claims": [HELD]}, tmp_path / "one")
    assert capsys.readouterr().out.endswith(f"\nopen {tmp_path}/one/more.html\n")


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


def test_the_page_marks_quick_runs_counts_claims_and_leaves_empty_columns_out(tmp_path, capsys):
    for name, quick, claims in (("one", True, [claim("a", 1.0)]), ("two", False, [HELD, MISSED])):
        with pytest.raises(SystemExit):
            conclude({"claims": claims, "settings": {"quick": quick}}, tmp_path / name)
        assert ("--quick" in capsys.readouterr().out) == quick, "the printed page says so, too"
    one, two = (tmp_path / "index.html").read_text().split("<h2>")[1:]
    assert one.startswith("one (quick run)") and "--quick" in one and "quick" not in two
    with pytest.raises(SystemExit):
        conclude({"claims": [HELD], "settings": {"quick": True}}, tmp_path / "exact")
    assert "--quick" not in capsys.readouterr().out, "what is exact is judged in a quick run, too"
    assert "No claim was judged." in one and "1 of 2 claims hold." in two
    assert "published" not in one + two and "range" not in one and "range or 95 % CI" in two
    assert one.count("<td>") == 4  # two headings, two cells
    assert '<td class="FAIL">FAIL</td></tr>' in two


def test_a_picture_s_alternative_text_is_its_title(tmp_path):
    one = plotting.curve({"": ([0, 1], [0, 1])}, title="Head L0H1\nlooks back", xlabel="",
                         ylabel="")
    two = Figure()
    for axes, title in zip(two.subplots(1, 2), ("left <one>", "right one"), strict=True):
        axes.set_title(title)
    three = Figure()
    three.subplots().set_title("of a panel")
    three.suptitle("of all")
    with pytest.raises(SystemExit):
        conclude({"claims": [HELD]}, tmp_path / "a", {"one": one, "three": three, "two": two,
                                                       "none": Figure()})
    page = Page((tmp_path / "index.html").read_text())
    assert [a["alt"] for tag, a in page.found if tag == "img"] == [
        "a: none", "Head L0H1 looks back", "of all", "left <one>; right one"]


PAYLOADS = ("<img src=x onerror=alert(1)>", '"><script>alert(2)<', "' onload='alert(3)", "a&lt;b",
            "javascript:alert(4)", "lr#2?x=%41", "a b", "é\u202e", "PASS", "..x")


class Page(HTMLParser):
    """The tags of a page, and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_names_and_claims_are_text_on_the_page_and_addresses_lead_to_their_files(tmp_path):
    line = asdict(HELD)
    for payload in PAYLOADS:
        folder = tmp_path / payload.replace("/", "_")
        folder.mkdir()
        (folder / f"{folder.name}.png").write_bytes(b"")
        (folder / f"{folder.name}.html").write_bytes(b"")
        claims = [line | {"claim": payload, "reported": payload, "control": payload}]
        write_json(folder / "results.json", {"about": payload, "found": payload, "claims": claims})
    write_index(tmp_path)

    page = Page((tmp_path / "index.html").read_text())
    tags = {tag for tag, _ in page.found}
    assert tags == {"html", "meta", "title", "style", "h1", "h2", "p", "table", "tr", "td", "a",
                    "img"}
    allowed = {"class", "href", "src", "alt", "lang", "charset", "name", "http-equiv", "content"}
    assert {name for _, attributes in page.found for name in attributes} == allowed
    assert {a["class"] for _, a in page.found if "class" in a} <= {"PASS", "FAIL"}
    policy = [a["content"] for _, a in page.found if "http-equiv" in a]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    addresses = [a.get("href", a.get("src")) for tag, a in page.found if tag in ("a", "img")]
    assert len(addresses) == 2 * len(PAYLOADS)
    for address in addresses:
        parts = urlsplit(address)
        assert not (parts.scheme or parts.netloc or parts.query or parts.fragment), address
        assert (tmp_path / unquote(parts.path)).exists(), address


@pytest.mark.parametrize(("kind", "place"), [
    (ExperimentConfig, "experiments"), (LabConfig, "course/labs")])
def test_a_program_runs_and_ends_with_what_came_out(tmp_path, capsys, kind, place):
    @dataclass(frozen=True)
    class OneConfig(kind):
        more: float = option(1.0, "of it")

    def run(cfg, folder):
        assert folder == tmp_path / "one" and torch.get_num_threads() == cfg.threads
        return {"claims": [Claim("it", cfg.more, math.nan, math.nan, True)]}

    with pytest.raises(SystemExit) as exit:
        perform(OneConfig, run, lambda result: {}, ABOUT.replace("experiments", place),
                argv=["--more", "2", "--out_dir", str(tmp_path)])
    assert exit.value.code == 0
    results = read_json(tmp_path / "one" / "results.json")
    assert results["claims"][0]["measured"] == 2 == results["settings"]["more"]
    assert results["about"] == "What it shows."
    assert "2" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "there"), [
    ('{"anything": 1}', True), ('{"claims": [{"claim": 1}]}', False), ('{"claims": 3}', False),
    ('{"claims": [{"claim": 1, "measured": 1, "low": 1, "high": 2}]}', False), ('{"cla', False),
    ('{"claims": [{"claim": "a", "measured": 1, "low": 1, "high": 2, "holds": "x"}]}', False),
    ('{"claims": [{"claim": "a", "measured": 1, "low": 1, "high": 2, "holds": []}]}', False),
    ('{"claims": [{"claim": "a", "measured": 1%s, "low": 1, "high": 2}]}' % ("0" * 400), False),
    ('{"claims": [{"claim": "\\ud800", "measured": 1, "low": 1, "high": 2}]}', True),
    ('{"claims": null}', False), ('{"about": 1}', False), ('{"found": []}', False),
    ("[" * 100_000, False), ("[]", False), ('{"claims": "abc"}', False)])
def test_results_in_another_format_do_not_stop_the_page(tmp_path, capsys, text, there):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(text)
    with pytest.raises(SystemExit) as exit:
        conclude({"claims": [HELD]}, tmp_path / "mine")
    page = (tmp_path / "index.html").read_text()
    assert exit.value.code == 0 and "<h2>mine" in page and ("<h2>other" in page) == there
    assert ("other" in capsys.readouterr().err) != there


@pytest.mark.parametrize("written", [False, True])
def test_a_refused_run_removes_its_empty_folder(tmp_path, written):
    def run(cfg, folder):
        if written:
            (folder / "checkpoint.pt").write_bytes(b"1")
        raise UserError("no heads; choose another")

    with pytest.raises(UserError, match="no heads"):
        perform(ExperimentConfig, run, lambda result: {}, ABOUT, argv=["--out_dir", str(tmp_path)])
    assert (tmp_path / "one").exists() == written


def test_a_number_that_is_not_finite_is_null_in_the_file_and_a_dash_on_the_page(tmp_path, capsys):
    never = claim("reached at step", [3.0, math.inf], holds=False)
    with pytest.raises(SystemExit):
        conclude({"claims": [never], "when": {"b": [math.nan, 1]}, "n": (2,)}, tmp_path / "one")
    text = (tmp_path / "one" / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN, Infinity
    assert results["claims"][0]["high"] is None and results["claims"][0]["low"] == 3
    assert results["when"] == {"b": [None, 1]} and results["n"] == [2]
    assert "3 to inf" in capsys.readouterr().out
    assert "3 to —" in (tmp_path / "index.html").read_text()
