"""What a user can get wrong: each is one line on stderr, exit code 2, and nothing half-written."""

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
    with pytest.raises(SystemExit) as exit_:
        run_program(lambda: main(flags))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert exit_.value.code == 2
    assert not out or main is train.main  # nothing is written before it is known to be possible
    assert len(lines) == 1 and ": error: " in lines[0]
    return lines[0]


def refuses_to_train(folder, flags, capsys):
    """The complaint about the flags, after which no run is left."""
    line = complaint(train.main, argv(folder, *flags), capsys)
    assert not list(folder.glob("outputs/*"))
    return line


def refuses_to_write(folder, flags, capsys):
    return complaint(generate.main, ["--out_dir", str(folder), "--device", "cpu", *flags], capsys)


# The text


@pytest.mark.parametrize("content, told", [
    (None, "No such file"), (b"", "is empty"), (b"abc \xff\xfe", "is not UTF-8 (byte 4 is 0xff)"),
    (b"ab" * 30, "validation part has 6 tokens, a window 8 and one more"),
    (b"a", "use a longer text, a smaller --model.n_ctx, or another --data.val_fraction"),
])
def test_a_text_that_cannot_be_learned_from(tmp_path, capsys, content, told):
    text = tmp_path / "mine.txt"
    if content is not None:
        text.write_bytes(content)
    line = refuses_to_train(tmp_path, ["--data.path", str(text)], capsys)
    assert told in line and "mine.txt" in line


def test_a_folder_in_place_of_a_text(tmp_path, capsys):
    assert "Is a directory" in refuses_to_train(tmp_path, ["--data.path", str(tmp_path)], capsys)


def test_a_file_in_place_of_tiny_shakespeare(tmp_path, capsys):
    (tmp_path / SHAKESPEARE_FILE).write_text("To be or not to be")
    flags = ["--data.dataset", "tiny_shakespeare", "--data.folder", str(tmp_path),
             "--logging.out_dir", str(tmp_path / "outputs")]
    assert "is not Tiny Shakespeare" in complaint(train.main, flags, capsys)


# The settings


@pytest.mark.parametrize("flags, told", [
    ("--model.n_heads 3", "n_heads=3 does not divide d_model=8; choose a divisor"),
    ("--model.n_layers -1", "n_layers=-1"),
    ("--model.d_model -8", "d_model=-8"),
    ("--model.n_ctx 0", "n_ctx=0"),
    ("--model.d_mlp 0", "d_mlp=0"),
    ("--model.n_heads 0", "n_heads=0"),
    ("--model.d_vocab 5", "d_vocab=5 is not the tokenizer's"),
    ("--model.d_vocab 500", "d_vocab=500 is not the tokenizer's"),
    ("--resume --overwrite", "choose one"),
    ("--model.dropout 1", "dropout=1.0"),
    ("--model.init_scale 0", "init_scale=0.0"),
    ("--data.val_fraction 1.5", "val_fraction=1.5"),
    ("--data.tokenizer words", "invalid choice: 'words'"),
    ("--data.tokenizer bpe --data.vocab_size 255", "vocab_size=255"),
    ("--data.vocab_size -1", "vocab_size=-1 is not possible; it must be 256 or more"),
    ("--data.vocab_size many", "invalid int value: 'many'"),
    ("--data.tokenizer bpe --data.vocab_size 300 --model.d_vocab 65", "d_vocab=65 is not the"),
    ("--train.max_steps 0", "max_steps=0"),
    ("--train.batch_size -4", "batch_size=-4"),
    ("--train.lr 0", "lr=0.0"),
    ("--train.lr nan", "lr=nan"),
    ("--train.muon_lr inf", "muon_lr=inf"),
    ("--train.beta2 1", "beta2=1.0"),
    ("--train.seed -1", "seed=-1"),
    ("--train.threads 0", "threads=0"),
    ("--train.accumulate 0", "accumulate=0"),
    ("--train.accumulate 3", "batch_size=4 does not divide into 1 ranks x accumulate=3"),
    ("--train.precision float16", "invalid choice: 'float16'"),
    ("--model.preset gpt5", "invalid choice: 'gpt5'"),
    ("--train.device cuda:99", "device=cuda:99 is not on this machine"),
    ("--train.device abacus", "device=abacus is not on this machine"),
    ("--model.n_layer 3", "unknown flag --model.n_layer; the closest: --model.n_layers"),
    ("--lr=3", "unknown flag --lr; the closest: "),
    ("--n_heads 3", "the closest: --model.n_heads"),
    ("stray", "unknown flag stray"),
    ("--model.activation swish", "invalid choice: 'swish'"),
    ("--train.optimizer sgd", "invalid choice: 'sgd'"),
    ("--model.n_layers two", "invalid int value: 'two'"),
    ("--model.attn_only perhaps", "'perhaps' is neither true nor false"),
    ("--model.n_layers", "expected one argument"),
    ("--logging.run_name a/b", "run_name='a/b' is not a folder name"),
    ("--logging.run_name ..", "run_name='..' is not a folder name"),
])
def test_a_setting_that_is_not_possible(tmp_path, capsys, flags, told):
    assert told in refuses_to_train(tmp_path, flags.split(), capsys)


@pytest.mark.parametrize("flags, told", [
    ("--train.seed 18446744073709551616", "seed="),
    ("--model.init_scale inf", "init_scale=inf"),
])
def test_a_setting_that_is_too_large(tmp_path, capsys, flags, told):
    assert told in refuses_to_train(tmp_path, flags.split(), capsys)


# The place


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--logging.out_dir", str(tmp_path / "file/below")]
    line = refuses_to_train(tmp_path, flags, capsys)
    assert "file/below: Not a directory" in line and "--logging.out_dir" in line


def test_a_name_that_is_taken(tmp_path, capsys):
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


def widen(path):
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["d_model"] = 24
    save_checkpoint(path, state)


@pytest.mark.parametrize("spoil, told", [
    (truncate, "is truncated or not a checkpoint"), (attack, "not a checkpoint"),
    (widen, "is from another architecture"),
    (lambda path: path.write_text("hello"), "not a checkpoint"),
    (lambda path: torch.save({"weights": 1}, path), "lacks config, model, optimizer"),
], ids=["truncated", "attack", "architecture", "text", "dict"])
@pytest.mark.parametrize("main, flags", [
    (generate.main, ["--run_name", "mine", "--out_dir"]),
    (train.main, [*named("mine"), "--train.device", "cpu", "--resume", "--logging.out_dir"]),
], ids=["generate", "train"])
def test_a_checkpoint_that_is_not_one(tmp_path, capsys, monkeypatch, spoil, told, main, flags):
    quietly(monkeypatch)
    train.main(argv(tmp_path, *named("mine", "--train.max_steps", "1")))
    path = tmp_path / "outputs/mine/checkpoint.pt"
    spoil(path)
    before, _ = path.read_bytes(), capsys.readouterr()
    line = complaint(main, [*flags, str(tmp_path / "outputs")], capsys)
    assert told in line and "mine/checkpoint.pt" in line
    assert path.read_bytes() == before
    assert not (path.parent / "victim").exists()


# Writing text


@pytest.mark.parametrize("flags, told", [
    (["--prompt", "bad zebra"], "unknown characters 'r' 'z'"),
    (["--prompt", "ä\n"], "unknown characters 'ä'"),
    (["--prompt", ""], "prompt='' is empty"),
    (["--temperature", "0"], "temperature=0.0 is not possible"),
    (["--temperature", "-1"], "temperature=-1.0"),
    (["--temperature", "nan"], "temperature=nan"),
    (["--top_k", "0"], "top_k=0"),
    (["--top_p", "2"], "top_p=2.0"),
    (["--top_p", "0"], "top_p=0.0"),
    (["--max_new_tokens", "-1"], "max_new_tokens=-1"),
    (["--device", "cuda:99"], "device=cuda:99 is not on this machine"),
    (["--run_name", "yours"], "no run 'yours'"),
    (["--model", "gpt3"], "'gpt3' is neither a folder with a config.json nor one of: gpt2, "),
    (["--model", "gpt2", "--run_name", "mine"], "choose one"),
    (["--temprature", "1"], "unknown flag --temprature; the closest: --temperature"),
    (["--prompt", "bad", "--max_new_tokens", "7"], "do not fit into n_ctx=9; ask for at most 6"),
    (["--greedy", "perhaps"], "'perhaps' is neither true nor false"),
    (["--repetition_penalty", "0"], "repetition_penalty=0.0 is not possible"),
    (["--repetition_penalty", "nan"], "repetition_penalty=nan"),
    (["--seed", "-1"], "seed=-1"),
    (["--stop", ""], "stop='' is empty"),
    (["--stop", "ab"], "stop='ab' is 2 tokens"),
    (["--stop", "z"], "unknown characters 'z'"),
    (["--steer", "ab"], "steer and steer_away go together"),
    (["--steer_away", "ab"], "steer and steer_away go together"),
    (["--steer", "ab", "--steer_away", ""], "steer_away='' is empty"),
    (["--steer", "z", "--steer_away", "a"], "unknown characters 'z'"),
    (["--steer", "bad cab ab", "--steer_away", "a"], "10 tokens do not fit into n_ctx=9"),
    (["--steer", "a", "--steer_away", "b", "--steer_at", "blocks.0.attn.hook_z"], "not the stream"),
    (["--steer", "a", "--steer_away", "b", "--steer_at", "blocks.9.hook_resid_post"],
     "blocks.9.hook_resid_post is not a hook of this model; the closest: "),
    (["--steer", "a", "--steer_away", "b", "--steer_scale", "inf"], "steer_scale=inf"),
    (["--run_name", "mine", "--model", "gpt2"], "are both given; choose one"),
    (["--model", "no/such/folder"], "no/such/folder"),
])
def test_a_wish_that_cannot_be_met(tmp_path, capsys, flags, told):
    save_run(tmp_path / "mine")
    assert told in refuses_to_write(tmp_path, flags, capsys)


def test_a_temperature_next_to_nothing_is_greedy_or_refused(tmp_path, capsys):
    save_run(tmp_path / "mine")
    flags = ["--out_dir", str(tmp_path), "--prompt", "a", "--max_new_tokens", "20",
             "--sliding"]
    generate.main([*flags, "--top_k", "1"])
    greedy = capsys.readouterr().out
    try:
        run_program(lambda: generate.main([*flags, "--temperature", "1e-40"]))
        assert capsys.readouterr().out == greedy
    except SystemExit as exit_:
        assert exit_.code == 2


def test_a_run_that_is_not_there_lists_those_that_are(tmp_path, capsys):
    assert "make one with: python train.py" in refuses_to_write(tmp_path, [], capsys)
    save_run(tmp_path / "mine")
    assert "there: mine" in refuses_to_write(tmp_path, ["--run_name", "yours"], capsys)


# Whole processes


@pytest.mark.parametrize("program, flags, told", [
    ("train.py", ["--model.n_layer", "3"], "the closest: --model.n_layers"),
    ("generate.py", [], "no run in outputs yet"),
])
def test_a_program_prints_one_line_without_a_traceback(tmp_path, program, flags, told):
    ran = subprocess.run([sys.executable, str(ROOT / program), *flags], cwd=tmp_path, text=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": ""}, timeout=100)
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr.startswith(f"{program}: error: ") and told in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
