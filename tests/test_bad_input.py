"""Mistakes of a user: each gives one line on stderr, exit code 2, and no half-written file."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import Attack, save_run
from test_train import argv, named, quietly

import generate
import train
from checkpoint import save_checkpoint
from data import SHAKESPEARE_FILE
from utils import run_program

ROOT = Path(__file__).resolve().parent.parent


def complaint(main, flags, capsys):
    """The one line that the program leaves on stderr as it gives up."""
    try:
        run_program(lambda: main(flags))
    except SystemExit as exit_:
        code = exit_.code
    else:
        pytest.fail(f"{flags} are not refused")

    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert code == 2, f"{flags} end with exit code {code}"
    assert len(lines) == 1 and ": error: " in lines[0], f"{flags} are refused with {err!r}"
    # Nothing is written before it is known to be possible.
    assert not out or main is train.main, f"{flags} write {out!r} before they are refused"
    return lines[0]


def refuses_to_train(folder, flags, capsys):
    """The complaint about the flags, after which no run is left."""
    line = complaint(train.main, argv(folder, *flags), capsys)
    assert not list(folder.glob("outputs/*")), f"{flags} are refused and leave a run"
    return line


def refuses_to_write(folder, flags, capsys):
    return complaint(generate.main, ["--out_dir", str(folder), "--device", "cpu", *flags], capsys)


# The text


def test_a_text_that_cannot_be_learned_from_is_named(tmp_path, capsys):
    rows = [(None, "No such file"), (b"", "empty"), (b"abc \xff\xfe", "(byte 4 is 0xff)"),
            (b"ab" * 30, "6 tokens"), (b"a", "--data.val_fraction")]
    text = tmp_path / "mine.txt"
    for content, told in rows:
        if content is not None:
            text.write_bytes(content)
        line = refuses_to_train(tmp_path, ["--data.path", str(text)], capsys)
        assert told in line and "mine.txt" in line, f"a text of {content} is refused with: {line}"


def test_a_folder_instead_of_a_text_is_named(tmp_path, capsys):
    assert str(tmp_path) in refuses_to_train(tmp_path, ["--data.path", str(tmp_path)], capsys)


def test_another_file_instead_of_tiny_shakespeare_is_refused(tmp_path, capsys):
    (tmp_path / SHAKESPEARE_FILE).write_text("To be or not to be")
    flags = ["--data.dataset", "tiny_shakespeare", "--data.folder", str(tmp_path),
             "--logging.out_dir", str(tmp_path / "outputs")]
    assert SHAKESPEARE_FILE in complaint(train.main, flags, capsys)


# The settings


def test_an_impossible_setting_is_named_with_its_value(tmp_path, capsys):
    # test_config.py has all that a config refuses; these are the ways in which it is noticed.
    rows = [
        ("--model.n_heads 3", "n_heads=3"),
        ("--model.n_layers -1", "n_layers=-1"),
        ("--model.init_scale inf", "init_scale=inf"),
        ("--data.val_fraction 1.5", "val_fraction=1.5"),
        ("--train.lr nan", "lr=nan"),
        ("--train.seed 18446744073709551616", "seed=18446744073709551616"),
        ("--train.accumulate 3", "accumulate=3"),
        ("--logging.run_name a/b", "run_name='a/b'"),
        ("--logging.run_name ..", "run_name='..'"),
        # What the tokenizer, the machine and the other flags do not allow
        ("--model.d_vocab 5", "d_vocab=5"),
        ("--model.d_vocab 500", "d_vocab=500"),
        ("--model.d_vocab_out 5", "d_vocab_out=5"),
        ("--model.d_vocab_out 5 --model.tie_embeddings", "d_vocab_out=5"),
        ("--data.tokenizer bpe --data.vocab_size 300 --model.d_vocab 65", "d_vocab=65"),
        ("--train.device cuda:99", "device=cuda:99"),
        ("--resume --overwrite", "choose one"),
        # What is no flag, or no value of its kind
        ("--model.n_layer 3", "--model.n_layers"),
        ("--lr=3", "unknown flag --lr"),
        ("--n_heads 3", "--model.n_heads"),
        ("stray", "unknown word stray"),
        ("--model.preset gpt5", "'gpt5'"),
        ("--train.optimizer sgd", "'sgd'"),
        ("--model.n_layers two", "'two'"),
        ("--model.attn_only perhaps", "'perhaps'"),
        ("--model.n_layers", "--model.n_layers"),
    ]
    for flags, told in rows:
        line = refuses_to_train(tmp_path, flags.split(), capsys)
        assert told in line, f"{flags} is refused with: {line}"


# The place


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--logging.out_dir", str(tmp_path / "file/below")]
    line = refuses_to_train(tmp_path, flags, capsys)
    assert "file/below" in line and "--logging.out_dir" in line


def test_a_name_that_is_taken_leaves_the_choice(tmp_path, capsys):
    save_run(tmp_path / "outputs/mine")
    before = (tmp_path / "outputs/mine/checkpoint.pt").read_bytes()
    line = complaint(train.main, argv(tmp_path, *named("mine")), capsys)
    assert "--resume" in line and "--overwrite" in line
    assert (tmp_path / "outputs/mine/checkpoint.pt").read_bytes() == before
    assert len(list(tmp_path.glob("outputs/*/*"))) == 2


def test_a_run_that_diverges_at_once_does_not_block_its_name(tmp_path, capsys, monkeypatch):
    quietly(monkeypatch)
    flags = argv(tmp_path, *named("mine"))
    complaint(train.main, [*flags, "--model.init_scale", "1e38", "--model.norm", "none"], capsys)
    train.main([*flags, "--resume"])
    assert (tmp_path / "outputs/mine/checkpoint.pt").exists()


# The checkpoint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def attack(path):
    path.write_bytes(pickle.dumps(Attack(path.parent / "victim"), protocol=2))


def write_words(path):
    path.write_text("hello")


def leave_out_all(path):
    torch.save({"weights": 1}, path)


def widen(path):
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["d_model"] = 24
    save_checkpoint(path, state)


def test_a_checkpoint_that_is_not_one_is_named_and_left_alone(tmp_path, capsys, monkeypatch):
    quietly(monkeypatch)
    train.main(argv(tmp_path, *named("mine", "--train.max_steps", "1")))
    path = tmp_path / "outputs/mine/checkpoint.pt"
    whole = path.read_bytes()
    capsys.readouterr()

    ways = [(truncate, "not a checkpoint"), (attack, "not a checkpoint"),
            (widen, "another"), (write_words, "not a checkpoint"),
            (leave_out_all, "lacks config, model, optimizer")]
    programs = [(generate.main, ["--run_name", "mine", "--out_dir"]),
                (train.main, [*named("mine"), "--train.device", "cpu", "--resume",
                              "--logging.out_dir"])]
    for spoil, told in ways:
        path.write_bytes(whole)
        spoil(path)
        before = path.read_bytes()
        for program, flags in programs:
            line = complaint(program, [*flags, str(tmp_path / "outputs")], capsys)
            assert told in line and "mine/checkpoint.pt" in line, f"{spoil.__name__}: {line}"
        assert path.read_bytes() == before, f"{spoil.__name__}: the file was changed"
        assert not (path.parent / "victim").exists(), "the checkpoint's code has run"


# Writing text


def test_an_impossible_request_is_named_with_its_value(tmp_path, capsys):
    save_run(tmp_path / "mine")
    # test_config.py and test_generate.py have the others; these are the ways in which it is noticed
    rows = [
        (["--prompt", "bad zebra"], "'r' 'z'"),
        (["--prompt", "ä\n"], "'ä'"),
        (["--prompt", ""], "prompt=''"),
        (["--prompt", "bad", "--max_new_tokens", "7"], "n_ctx=9"),
        (["--temperature", "0"], "temperature=0.0"),
        (["--top_p", "2"], "top_p=2.0"),
        (["--device", "cuda:99"], "device=cuda:99"),
        (["--run_name", "yours"], "'yours'"),
        (["--model", "gpt3"], "'gpt3'"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--run_name", "mine", "--model", "gpt2"], "run_name='mine' and model='gpt2'"),
        (["--temprature", "1"], "--temperature"),
        (["--greedy", "perhaps"], "'perhaps'"),
        (["--stop", ""], "stop=''"),
        (["--stop", "z"], "'z'"),
        (["--steer", "ab"], "steer_away"),
        (["--steer", "ab", "--steer_away", ""], "steer_away=''"),
        (["--steer", "a", "--steer_away", "b", "--steer_scale", "inf"], "steer_scale=inf"),
    ]
    for flags, told in rows:
        line = refuses_to_write(tmp_path, flags, capsys)
        assert told in line, f"{flags} are refused with: {line}"


def test_the_message_on_a_missing_run_lists_the_runs(tmp_path, capsys):
    assert "make one with: python train.py" in refuses_to_write(tmp_path, [], capsys)
    save_run(tmp_path / "mine")
    assert "there: mine" in refuses_to_write(tmp_path, ["--run_name", "yours"], capsys)


# Whole processes


@pytest.mark.slow
@pytest.mark.parametrize("program, flags, told", [
    ("train.py", ["--model.n_layer", "3"], "--model.n_layers"),
    ("generate.py", [], "no run in outputs"),
])
def test_a_program_prints_one_line_without_a_traceback(tmp_path, program, flags, told):
    ran = subprocess.run([sys.executable, str(ROOT / program), *flags], cwd=tmp_path, text=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": ""}, timeout=100)
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr.startswith(f"{program}: error: ") and told in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
