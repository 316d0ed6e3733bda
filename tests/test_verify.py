"""Verification: a false claim comes out FAIL, what can't be judged is no pass, and an interrupted
run goes on where it stopped."""

import datetime
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import run_here

from experiments import verify
from experiments.common import ROOT, as_dicts, claim, threshold_source, thresholds_of
from experiments.verification import measure
from experiments.verification.measure import (
    EXPERIMENTS,
    FIRST_SEED,
    Command,
    Outcome,
    all_commands,
    read_kept,
    run_command,
    seeds_of_date,
    weights_are_there,
    what_it_ran_on,
)
from experiments.verification.report import count_outcomes, verification_page
from utils import UserError, locked, write_json

RAN_ON = {"seeds": "7, 8, 9"}
PLANTED = '''"""A planted experiment.

    python experiments/planted.py

Thresholds: planted.
"""
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from experiments.common import ExperimentConfig, claim, perform
from utils import run_program

def run(cfg, folder):
    return {{"claims": [claim("two is more than one", 2.0, above=1, judged=not cfg.quick),
                        claim("one is more than two", 1.0, above=2, judged=not cfg.quick)]}}

run_program(lambda: perform(ExperimentConfig, run, lambda result: {{}}, __doc__))
'''


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A function that runs a Command of which nothing is run: results with one claim that holds, or
    one that doesn't, are written, unless it breaks off before that, and the exit code is given.
    Returns the Outcome; .folders: where results were put, one for each run."""
    folders = []

    def program(words, code, holds, writes, **how):
        folders.append(Path(words[words.index("--out_dir") + 1]))
        if writes:
            (folders[-1] / "planted").mkdir(parents=True, exist_ok=True)
            line = claim("two is more than one", 2.0, above=1 if holds else 3)
            write_json(folders[-1] / "planted" / "results.json", {
                "claims": as_dicts([line]), "thresholds": ""})
        how["stdout"].write("progress\nZeroDivisionError: planted\n")
        return SimpleNamespace(returncode=code)

    def run(exit_code=0, flags=(), folder=tmp_path, holds=True, writes=True):
        monkeypatch.setattr(measure.subprocess, "run",
                            partial(program, code=exit_code, holds=holds, writes=writes))
        return run_command(Command("planted", flags), folder, what_it_ran_on())

    run.folders = folders
    return run


def rows_of(page, heading):
    """The table rows below a heading of a page, each a list of cells."""
    part = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in part.split("\n") if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_planted_false_claim_fails_and_the_page_begins_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "code_digest", lambda: "this code")
    monkeypatch.setattr(measure.subprocess, "run", run_here)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "planted.py").write_text(PLANTED.format(root=str(ROOT)))
    command = Command("planted", ("--seeds", "7", "8", "9"))
    outcome = run_command(command, tmp_path, what_it_ran_on())
    assert [line.holds for line in outcome.claims] == [True, False] and outcome.failed
    page = verification_page([outcome], RAN_ON)
    assert page.index("## What fails") < page.index("## planted")
    (failing,) = rows_of(page, "What fails")
    assert failing[0] == "planted: one is more than two" and failing[-1] == "FAIL"
    held, missed = rows_of(page, "planted")
    assert held == ["two is more than one", "2", "", "above 1", "planted", "", "PASS"]
    assert missed[-1] == "FAIL"
    assert "**1 claims hold, 1 fails, none skipped**" in page
    assert "`python experiments/planted.py --seeds 7 8 9`" in page


def test_a_run_goes_on_where_it_stopped_and_begins_anew_for_other_seeds_or_code(
        pretended, monkeypatch):
    monkeypatch.setattr(measure, "code_digest", lambda: "this code")
    first = pretended()
    again = pretended()
    assert len(pretended.folders) == 1 and again == first
    pretended(flags=("--seeds", "4", "5", "6"))
    assert len(pretended.folders) == 2
    monkeypatch.setattr(measure, "code_digest", lambda: "other code")
    pretended(flags=("--seeds", "4", "5", "6"))
    assert len(pretended.folders) == 3


def test_a_program_that_breaks_off_fails_and_is_run_again(pretended):
    broken = pretended(exit_code=1, writes=False)
    assert broken.failed and not broken.claims
    assert "exit code 1: ZeroDivisionError: planted" in broken.error
    assert "FAIL" in verification_page([broken], RAN_ON)
    assert not pretended().error and len(pretended.folders) == 2


def test_old_results_are_not_taken_for_those_of_a_program_that_breaks_off(pretended):
    assert not pretended(exit_code=1, holds=False).error  # a claim that fails exits with 1 too
    broken = pretended(exit_code=1, writes=False, flags=("--seeds", "4", "5", "6"))
    assert broken.error and not broken.claims


def test_a_program_that_breaks_off_after_its_results_are_written_fails(pretended):
    broken = pretended(exit_code=1)  # though no claim fails
    assert broken.error == "exit code 1: ZeroDivisionError: planted" and not broken.claims
    assert not pretended().failed


def test_models_of_another_code_are_in_another_folder(pretended, monkeypatch):
    for code in ("one code", "other code"):
        monkeypatch.setattr(measure, "code_digest", lambda code=code: code)
        pretended(flags=("--seeds", "7"))
        pretended(flags=("--seeds", "8"))
    one, same, other, _ = pretended.folders
    assert one == same != other


def test_a_change_of_the_code_while_it_runs_is_told(pretended, monkeypatch, tmp_path):
    codes = iter(("one code", "other code"))
    monkeypatch.setattr(measure, "code_digest", lambda: next(codes))
    with pytest.raises(UserError, match="the code was changed while planted ran"):
        pretended()
    assert not list(tmp_path.glob("*.json"))


def test_a_folder_that_is_named_from_elsewhere_is_found(pretended, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not pretended(folder=Path(".")).error
    (folder,) = pretended.folders
    assert folder.is_absolute() and folder.parent == tmp_path


def test_a_result_on_another_text_is_not_read(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(verify, "run_all",
                        lambda commands, folder, ran_on: given.append(ran_on) or [])
    for text in ("Tiny Shakespeare", "built-in corpus"):
        monkeypatch.setattr(measure, "load_text", lambda cfg, text=text: ("", text, None))
        with pytest.raises(SystemExit):
            verify.main(["--only", "wired_circuits", "--out_dir", str(tmp_path)])
    assert [ran_on["text"] for ran_on in given] == ["Tiny Shakespeare", "built-in corpus"]

    write_json(tmp_path / "kept.json", given[0] | {"error": ""})
    assert read_kept(tmp_path / "kept.json", given[0]) is not None
    assert read_kept(tmp_path / "kept.json", given[1]) is None


def test_only_a_whole_run_writes_the_page_in_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "run_all", lambda *given: [])
    monkeypatch.setattr(verify, "name_of_text", lambda: "built-in corpus")
    (tmp_path / "docs").mkdir()
    for flags, page in ((["--only", "wired_circuits"], "out/verify/verify.md"),
                        (["--quick"], "out/verify_quick/verify.md"), ([], "docs/verify.md")):
        with pytest.raises(SystemExit):
            verify.main([*flags, "--out_dir", str(tmp_path / "out")])
        assert (tmp_path / page).exists(), flags
        assert (tmp_path / "docs" / "verify.md").exists() == (not flags), flags


def test_two_runs_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "run_all", lambda *given: pytest.fail("it ran"))
    folder = tmp_path / "verify_quick"
    folder.mkdir()
    with locked(folder / "lock", "busy"), pytest.raises(UserError, match="another run writes"):
        verify.main(["--quick", "--out_dir", str(tmp_path)])


def test_a_row_of_the_page_is_one_line_whatever_a_claim_says():
    line = claim("a | b\nand c", 2.0, above=1, control="x\n\ny")
    page = verification_page([Outcome(Command("planted", ()), (line,), "p")], RAN_ON)
    (row,) = [each for each in page.split("\n") if "and c" in each]
    assert row.startswith("| a \\| b and c | 2 |") and row.endswith("| PASS |") and "x y" in row


def test_what_is_skipped_is_no_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CACHE", str(tmp_path))
    assert not weights_are_there("gpt2")
    command = all_commands((1, 2, 3), only=("copy_suppression",))[-1]
    assert command.weights == "gpt2" and "--model gpt2" in command.text
    outcome = run_command(command, tmp_path, what_it_ran_on())
    assert outcome.skipped and not outcome.failed and not list(tmp_path.iterdir())
    assert count_outcomes([outcome]) == "0 claims hold, none fail, 1 skipped"
    (row,) = rows_of(verification_page([outcome], RAN_ON), "copy_suppression_gpt2")
    assert row[-1] == "SKIP"

    (tmp_path / "gpt2").mkdir()
    for file in measure.PRETRAINED_FILES:
        (tmp_path / "gpt2" / file).touch()
    assert weights_are_there("gpt2")


def test_seeds_come_from_the_date_and_no_threshold_was_chosen_on_them():
    day = datetime.date(2026, 1, 31)
    seeds = seeds_of_date(day)
    assert seeds == seeds_of_date(day) and len(set(seeds)) == 3 and min(seeds) >= FIRST_SEED
    other_days = {seeds_of_date(day + datetime.timedelta(days=n)) for n in range(1, 30)}
    assert len(other_days | {seeds}) == 30
    for name in EXPERIMENTS:
        said = thresholds_of((ROOT / "experiments" / f"{name}.py").read_text())
        chosen_on = [int(number) for number in re.findall(r"\d+", said)]
        assert said and all(number < FIRST_SEED for number in chosen_on), (name, said)


def test_every_experiment_is_verified_but_those_that_time_the_machine():
    programs = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert set(EXPERIMENTS) == programs - {"common", "verify", "claim_card", "benchmark", "race"}
    listed = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    assert tuple(re.search(r"EXPERIMENTS = (.*)", listed)[1].split()) == EXPERIMENTS


def test_a_threshold_says_where_it_comes_from():
    about = "Title.\n\nExpected: x.\n\nThresholds: chosen on\nseeds 0 to 2.\n\nChapter: 1"
    assert thresholds_of(about) == "chosen on seeds 0 to 2" and thresholds_of("Title.") == ""
    for line, source in ((claim("a", 1.0, above=0), "the header"),
                         (claim("a", 1.0, between=(1, 1)), "exact"),
                         (claim("a", 1.0, p=0.01), "p below 0.05"),
                         (claim("a", 1.0, above=0, source="A 2020"), "A 2020")):
        assert threshold_source(line, "the header") == source


def test_bad_settings_are_refused():
    for bad in ({"seeds": (101, 102)}, {"seeds": (101, 101, 102)}, {"seeds": (2, 101, 102)},
                {"only": ("race",)}, {"threads": 0}, {"date": "31.1.2026"}):
        with pytest.raises(UserError):
            verify.VerifyConfig(**bad)
    assert verify.VerifyConfig(date="2026-01-31").day() == datetime.date(2026, 1, 31)
    assert verify.VerifyConfig(seeds=(100, 101, 102)).seeds == (100, 101, 102)
    assert verify.VerifyConfig(seeds=(1,), quick=True).seeds == (1,)


@pytest.mark.slow
def test_the_quick_program_runs_an_experiment_and_leaves_the_page_in_docs_alone(
        tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "verify.md"
    before = page.read_bytes() if page.exists() else None
    with pytest.raises(SystemExit) as ended:
        verify.main(["--quick", "--only", "wired_circuits", "--out_dir", str(tmp_path)])
    assert ended.value.code == 0
    assert (page.read_bytes() if page.exists() else None) == before
    written = tmp_path / "verify_quick" / "verify.md"
    assert "PASS" in written.read_text() and str(written) in capsys.readouterr().out
