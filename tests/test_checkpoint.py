"""Runs on disk: saved states are restored, and a file that is not a checkpoint changes nothing."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import WIDE, refusal, tiny_model, tiny_tokens

import checkpoint
import corpus
from checkpoint import (
    RunLock,
    add_rows,
    export_pretrained,
    find_run,
    list_runs,
    load_checkpoint,
    load_model,
    new_run_folder,
    read_metrics,
    run_flags,
    save_checkpoint,
    write_run_config,
)
from config import Config, DataConfig, ModelConfig, config_from_dict
from data import load_dataset
from model import GPT
from tokenizer import BPETokenizer, CharTokenizer
from utils import UserError

TOKENIZER = CharTokenizer().fit("\n abcdefghi")  # as many characters as the tiny model's d_vocab


def state_of(model):
    """A checkpoint of the model, before any step."""
    return {"model": model.state_dict(), "optimizer": [], "step": 0,
            "config": dataclasses.asdict(Config(model=model.cfg)),
            "tokenizer": TOKENIZER.state_dict()}


def save_run(folder, seed=1, **changes):
    """Save a tiny model as a run, and one of another seed as its best state; return both."""
    models = tiny_model(seed, **changes), tiny_model(seed + 100, **changes)
    for model, file in zip(models, ("checkpoint.pt", "best.pt"), strict=True):
        save_checkpoint(folder / file, state_of(model))
    return models


def same_logits(model, other):
    return torch.equal(model(tiny_tokens()), other(tiny_tokens()))


# Finding and loading


@pytest.mark.parametrize("changes", [
    {}, {"attn_only": True}, {"norm": "none"}, {"tie_embeddings": True}, {"n_layers": 0},
    {"positions": "sinusoidal"}, {"unembed_bias": True, "attn_bias": False}, {"dropout": 0.5},
    {**WIDE, "d_vocab_out": 13},
])
def test_a_model_comes_back_with_its_logits_its_config_and_its_tokenizer(tmp_path, changes):
    saved, _ = save_run(tmp_path / "mine", **changes)
    model, tokenizer = load_model("mine", tmp_path)
    assert model.cfg == saved.cfg and not model.training
    assert same_logits(model, saved)
    assert tokenizer.encode("bad cab") == TOKENIZER.encode("bad cab")
    assert tokenizer.decode(range(11)) == "\n abcdefghi"


def test_a_run_from_before_a_setting_came_has_its_default(tmp_path):
    saved, _ = save_run(tmp_path / "mine", n_heads=2, activation="relu")
    state = state_of(saved)
    for name in ("d_head", "d_vocab_out", "norm_epsilon"):
        del state["config"]["model"][name]
    save_checkpoint(tmp_path / "mine" / "checkpoint.pt", state)
    model, _ = load_model("mine", tmp_path)
    assert model.cfg == saved.cfg and same_logits(model, saved)


def test_a_run_is_found_by_its_name_by_its_folder_and_as_the_newest(tmp_path):
    old, _ = save_run(tmp_path / "zz", seed=1)
    new, _ = save_run(tmp_path / "aa", seed=2)
    os.utime(tmp_path / "zz/checkpoint.pt", (1, 1))
    assert same_logits(load_model("zz", tmp_path)[0], old)
    assert same_logits(load_model(tmp_path / "zz", "elsewhere")[0], old)
    assert same_logits(load_model(out_dir=tmp_path)[0], new)
    os.utime(tmp_path / "aa/checkpoint.pt", (0, 0))
    assert same_logits(load_model(out_dir=tmp_path)[0], old)
    assert [folder.name for folder in list_runs(tmp_path)] == ["aa", "zz"]


def test_the_best_state_is_loaded_when_it_is_asked_for(tmp_path):
    last, best = save_run(tmp_path / "mine")
    assert same_logits(load_model("mine", tmp_path, file="best.pt")[0], best)
    assert not same_logits(last, best)


def test_an_unknown_run_lists_those_that_are_there(tmp_path):
    message = refusal(lambda: find_run("mine", tmp_path))
    assert "'mine'" in message and "there: none" in message
    for name in ("one", "two"):
        save_run(tmp_path / name)
    (tmp_path / "no checkpoint").mkdir()
    assert refusal(lambda: find_run("mine", tmp_path)).endswith("there: one, two")


def test_without_any_run_the_message_says_how_to_make_one(tmp_path):
    assert "python train.py" in refusal(lambda: load_model(out_dir=tmp_path))


# Files that are not checkpoints


class Attack:
    """Unpickling it creates the file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def pickled(path, value):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [pickled, lambda path, value: torch.save(value, path)],
                         ids=["pickle", "torch.save"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, write):
    path = tmp_path / "checkpoint.pt"
    victim = tmp_path / "victim"
    write(path, state_of(tiny_model()) | {"step": Attack(victim)})
    assert str(path) in refusal(lambda: load_checkpoint(path))
    assert not victim.exists()
    pickle.loads(pickle.dumps(Attack(victim))).close()
    assert victim.exists()  # the attack works where it is let


def test_a_truncated_file_and_another_kind_of_file_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state_of(tiny_model()))
    whole = path.read_bytes()
    truncated = [whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.99)]
    for content in [*truncated, b"once upon a time", b"\x80\x02", bytes(1000), b"PK\x03\x04"]:
        path.write_bytes(content)
        case = f"{len(content)} bytes: {content[:20]}"
        assert f"{path} is truncated" in refusal(lambda: load_checkpoint(path), case), case


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path):
    path = tmp_path / "mine/checkpoint.pt"
    save_run(tmp_path / "mine")
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")  # the last record, in the list at the end
    raw[entry + 38] |= 0x10
    path.write_bytes(raw)
    assert "torch's format" in refusal(lambda: load_model("mine", tmp_path))


def test_no_bit_of_a_checkpoint_can_flip_and_give_other_weights(tmp_path):
    path = tmp_path / "mine/checkpoint.pt"
    saved, _ = save_run(tmp_path / "mine")
    whole = path.read_bytes()
    draw = random.Random(0)
    weights = whole.find(saved.W_E.detach().numpy().tobytes())
    refused = 0
    for place in [weights + 3, *(draw.randrange(len(whole)) for _ in range(200))]:
        raw = bytearray(whole)
        raw[place] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        try:
            model, _ = load_model("mine", tmp_path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error), place
        else:  # of what lies between the records
            assert same_logits(model, saved), f"bit {place} gives another model"
    assert refused > 50


def test_a_checkpoint_that_claims_more_than_is_in_its_file_is_refused(tmp_path):
    path = tmp_path / "mine/checkpoint.pt"
    state = state_of(tiny_model())
    expanded = state["model"] | {"token_embedding.W_E": torch.zeros(1).expand(10**7, 10**6)}
    for changed in (state | {"model": expanded},
                    state | {"optimizer": [torch.eye(3).to_sparse()]}):
        save_checkpoint(path, changed)
        assert "a tensor" in refusal(lambda: load_checkpoint(path))
    save_checkpoint(path, state)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "x", "w") as short:
        for record in whole.infolist():
            content = whole.read(record)
            short.writestr(record.filename, content[:4] if "/data/" in record.filename else content)
    assert str(tmp_path / "x") in refusal(lambda: load_checkpoint(tmp_path / "x"))
    with zipfile.ZipFile(path) as whole, \
            zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    assert "torch's format" in refusal(lambda: load_checkpoint(tmp_path / "x"))


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "none.pt") in refusal(lambda: load_checkpoint(tmp_path / "none.pt"))


def test_a_value_that_is_not_a_checkpoint_is_refused_by_what_it_lacks(tmp_path):
    path = tmp_path / "c.pt"
    state = state_of(tiny_model())
    everything = ["config", "model", "optimizer", "step", "tokenizer"]
    for value, lacking in [
        (3, everything), ([1, 2], everything), (torch.zeros(3), everything),
        *[({key: state[key] for key in state if key not in lost}, lost)
          for lost in (["config"], ["step", "tokenizer"])],
        (state | {"step": "three"}, ["step"]), (state | {"optimizer": {}}, ["optimizer"]),
        (state | {"step": -1}, ["step"]), (state | {"step": True}, ["step"]),
        (state | {"model": {"a": 3}}, ["model"]),
        (state | {"model": {3: torch.ones(1)}}, ["model"]),
        (state | {"model": {"a": torch.ones(1, dtype=torch.int)}}, ["model"]),
        (state | {"sampler": torch.ones(3)}, ["sampler"]), (state | {"rng": "x"}, ["rng"]),
        (state | {"recent": [(1, 2)]}, ["recent"]), (state | {"recent": [(1, "a")]}, ["recent"]),
        (state | {"threads": 0}, ["threads"]), (state | {"lost": None}, ["lost"]),
        *[(state | {"tokenizer": {"kind": "char", "symbols": symbols}}, ["tokenizer"])
          for symbols in (3, [3], ["a", torch.ones(1)], [("a", "b", "c")], {"a": 1})],
        (state | {"seconds": "a"}, ["seconds"]), (state | {"data_sha256": 3}, ["data_sha256"]),
    ]:
        torch.save(value, path)
        message = refusal(lambda: load_checkpoint(path), f"without {lacking}")
        assert message.endswith(f"it lacks {', '.join(lacking)}"), message


def test_a_config_that_makes_no_model_is_refused(tmp_path):
    state = state_of(tiny_model())
    for config, problem in [
        ({"model": {"n_layer": 2}}, "n_layers"), ({"model": {"n_heads": 7}}, "n_heads=7"),
        ({"model": 3}, "config"), ({"model": {"n_layers": "two"}}, "config"),
    ]:
        save_checkpoint(tmp_path / "mine/checkpoint.pt", state | {"config": config})
        message = refusal(lambda: load_model("mine", tmp_path), config)
        assert "checkpoint.pt" in message and problem in message, message


def test_a_config_of_a_larger_model_than_its_weights_takes_neither_time_nor_memory(tmp_path):
    state = state_of(tiny_model())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, before[1]))
    try:
        for positions in ("learned", "sinusoidal"):
            for name in ("n_layers", "d_model", "d_mlp", "n_ctx", "d_vocab", "n_heads", "d_head",
                         "d_vocab_out"):
                for size in (10**6, 10**9, 10**12, 10**30, 2.0, True, "12", [12]):
                    config = state["config"]
                    shape = config["model"] | {"positions": positions, name: size}
                    save_checkpoint(tmp_path / "mine/checkpoint.pt",
                                    state | {"config": config | {"model": shape}})
                    start = time.perf_counter()
                    message = refusal(lambda: load_model("mine", tmp_path), (name, size))
                    assert "checkpoint.pt" in message and len(message) < 1000
                    assert time.perf_counter() - start < 2, (name, size)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Weights that do not fit


def test_weights_of_another_architecture_are_named_and_none_is_copied():
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for changes, *told in [
        ({"d_vocab": 12}, "token_embedding.W_E", "[12, 12]", "[11, 12]"),
        ({"n_layers": 1}, "blocks.1.", "is missing", "more"),
        ({"n_layers": 3}, "blocks.2.", "is unknown"),
        ({"attn_only": True}, "blocks.0.mlp.W_in is missing"),
    ]:
        weights = tiny_model(seed=2, **changes).state_dict()
        message = refusal(partial(model.load_weights_, weights, "that.pt"), changes)
        assert all(part in message for part in ["that.pt", *told]), message
        for name, weight in model.state_dict().items():
            assert torch.equal(before[name], weight), f"{changes}: {name} is copied"


def test_weights_that_fit_are_copied():
    model = tiny_model(seed=1)
    other = tiny_model(seed=2)
    model.load_weights_(other.state_dict(), "that.pt")
    assert same_logits(model, other)


# Writing


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_no_other_file(
    tmp_path, monkeypatch, interruption
):
    old, _ = save_run(tmp_path / "mine")

    def interrupted(file):
        raise interruption

    monkeypatch.setattr(os, "fsync", interrupted)  # all is written, nothing is in its place yet
    files = sorted((tmp_path / "mine").iterdir())
    with pytest.raises((KeyboardInterrupt, UserError)):
        save_checkpoint(tmp_path / "mine/checkpoint.pt", {})
    assert sorted((tmp_path / "mine").iterdir()) == files
    assert same_logits(load_model("mine", tmp_path)[0], old)


@contextlib.contextmanager
def full_disk(n_bytes):
    """While it is open, no file may be longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_gives_one_line_and_the_old_checkpoint_stays(tmp_path):
    old, _ = save_run(tmp_path / "mine")
    path = tmp_path / "mine/checkpoint.pt"
    with full_disk(1000):
        message = refusal(lambda: save_checkpoint(path, {"model": torch.zeros(10_000)}))
    assert str(path) in message and "make room" in message and "\n" not in message
    assert same_logits(load_model("mine", tmp_path)[0], old)


def test_a_run_is_named_with_its_folder_if_that_is_not_the_default():
    for folder, flags in [
        ("outputs/mine", "--x.run_name mine"), ("./outputs/mine", "--x.run_name mine"),
        ("other/mine", "--x.run_name mine --x.out_dir other"),
        ("/outputs/mine", "--x.run_name mine --x.out_dir /outputs"),
        ("my runs/the first", "--x.run_name 'the first' --x.out_dir 'my runs'"),
    ]:
        assert run_flags(Path(folder), "--x.") == flags


def test_runs_without_a_name_are_numbered_after_the_last(tmp_path):
    assert new_run_folder(tmp_path).name == "run-001"
    assert new_run_folder(tmp_path).name == "run-002"
    (tmp_path / "run-041").mkdir()
    (tmp_path / "run-final").mkdir()
    assert new_run_folder(tmp_path).name == "run-042"


def test_a_taken_name_is_refused_and_its_files_stay(tmp_path):
    save_run(tmp_path / "mine")
    message = refusal(lambda: new_run_folder(tmp_path, "mine"))
    assert "'mine'" in message and "--resume" in message and "--overwrite" in message
    load_model("mine", tmp_path)

    (tmp_path / "empty").mkdir()  # there is nothing to resume
    message = refusal(lambda: new_run_folder(tmp_path, "empty"))
    assert "'empty'" in message and "--resume" not in message and "--overwrite" in message


def test_overwriting_removes_the_run_s_files_and_nothing_else(tmp_path):
    save_run(tmp_path / "mine")
    for name in (*checkpoint.RUN_FILES, "notes.txt", ".checkpoint.pt.123"):
        (tmp_path / "mine" / name).touch()
    folder = new_run_folder(tmp_path, "mine", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_name_that_is_not_a_number_does_not_count_among_the_runs(tmp_path):
    for name in ("run-²", "run-٣", "run-", "run-1e9", "run-" + "9" * 30, "run-007"):
        (tmp_path / name).mkdir()
    assert new_run_folder(tmp_path).name == "run-008"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_reused_only_if_nothing_was_learned_in_it(tmp_path):
    folder = tmp_path / "mine"
    new = partial(new_run_folder, tmp_path, "mine", unless_used=True)
    save_run(tmp_path / "whole")
    trained = state_of(tiny_model()) | {"step": 3}
    for name, content in {
        "best.pt": trained, "notes.txt": b"mine", "metrics.jsonl": b'{"step": 4, "seconds": 1}\n',
        "loss.png": b"", "config.json": b'{"model_type": "gpt2"}', "results.json": b"{}",
        "metrics.jsonl ": b"\xff\n", "best.pt ": b"half of a file", "below": None,
    }.items():
        folder.mkdir()
        path = folder / name.strip()
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_checkpoint(path, content)
        before = files_of(folder)
        message = refusal(new, name)
        assert path.name in message and "\n" not in message, f"{name}: {message}"
        assert files_of(folder) == before, f"{name} is not what it was"
        shutil.rmtree(folder)

    # What a process leaves that was killed before its first checkpoint
    save_checkpoint(tmp_path / "mine/best.pt", state_of(tiny_model()))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    (folder / "metrics.jsonl").write_text('{"step": 0, "val_loss": 4.5}\n{"st')
    (folder / ".checkpoint.pt.123").write_text("half")
    (folder / ".lock").touch()
    assert new() == folder and not files_of(folder)


def test_a_folder_that_is_not_a_run_is_not_overwritten(tmp_path):
    tiny_model(tie_embeddings=True).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "file").write_text("a")
    before = files_of(tmp_path / "gpt2")
    for name, told in (("gpt2", "model.safetensors"), ("file", "is a file")):
        overwrite = partial(new_run_folder, tmp_path, name, overwrite=True)
        assert told in refusal(overwrite), name
    assert files_of(tmp_path / "gpt2") == before and (tmp_path / "file").read_text() == "a"


HOLD = """import sys; sys.path.insert(0, sys.argv[1])
from checkpoint import RunLock
lock = RunLock()
lock.take(sys.argv[2])
print("taken", flush=True)
sys.stdin.read()"""


@pytest.mark.slow
def test_the_lock_of_a_run_belongs_to_a_process_until_it_ends_in_any_way(tmp_path):
    def hold():
        other = subprocess.Popen([sys.executable, "-c", HOLD, Path(checkpoint.__file__).parent,
                                  tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"taken\n"
        return other

    other = hold()
    with RunLock() as lock:
        message = refusal(lambda: lock.take(tmp_path))
        assert "another process" in message and str(tmp_path) in message
        other.kill()
        other.communicate()
        lock.take(tmp_path)  # although its file is still there
        lock.take(tmp_path)
        refusal(lambda: RunLock().take(tmp_path), "a second one in one process")
    assert not list(tmp_path.iterdir()), "a lock that was given back leaves a file"
    with RunLock() as lock:
        lock.take(tmp_path)


def test_a_run_that_another_process_writes_is_neither_begun_nor_replaced(tmp_path):
    save_run(tmp_path / "mine")
    before = files_of(tmp_path / "mine")
    with RunLock() as lock:
        lock.take(tmp_path / "mine")
        for how in ({}, {"overwrite": True}, {"unless_used": True}):
            message = refusal(partial(new_run_folder, tmp_path, "mine", **how), how)
            assert "another process" in message, f"{how}: {message}"
        assert files_of(tmp_path / "mine").keys() == before.keys() | {".lock"}
    assert files_of(tmp_path / "mine") == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = refusal(lambda: new_run_folder(tmp_path / "file/below"))
    assert "file/below" in message and "--logging.out_dir" in message


def test_a_full_disk_gives_one_line_and_the_metrics_before_it_stay(tmp_path):
    rows = [{"step": step} for step in range(4)]
    add_rows(tmp_path, rows[:2])
    with full_disk(30):
        for afresh in (True, False):
            new = rows if afresh else rows[2:]
            message = refusal(partial(add_rows, tmp_path, new, afresh=afresh), f"{afresh=}")
            assert "metrics.jsonl" in message and "make room" in message and "\n" not in message
    assert read_metrics(tmp_path) == rows[:2]
    add_rows(tmp_path, rows[1:], afresh=True)
    assert read_metrics(tmp_path) == rows[1:]


def test_a_truncated_line_of_the_metrics_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert read_metrics(tmp_path / "none") == []


def test_damaged_lines_of_the_metrics_are_skipped(tmp_path):
    good = b'{"step": 1, "above_floor": {"all": 0.5}}'
    bad = (b"\xff", b"5", b"{}", b"[" * 100_000, b"null", b'{"step": "1"}', b'{"step": true}',
           b'{"step": -1}', b'{"step": 1e3}', b'{"step": 1, "lr": "x"}', b'{"step": 1, "lr": []}',
           b'{"step": %d}' % 10**30, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1, "lr": null}',
           b'{"step": 1, "above_floor": 3}', b'{"step": 1, "above_floor": {"all": "x"}}')
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*bad, good, b""]))
    assert read_metrics(tmp_path) == [json.loads(good)]


def test_the_description_has_the_settings_and_the_text(tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 100)
    cfg = Config(DataConfig(path=str(tmp_path / "text.txt")), ModelConfig(n_ctx=8, d_vocab=4))
    write_run_config(tmp_path, cfg, load_dataset(cfg.data, 8), GPT(cfg.model))
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["text"]["name"] == "text.txt" and len(told["text"]["sha256"]) == 64
    assert told["versions"]["torch"] == torch.__version__
    assert told["device"] == "cpu" and told["threads"] == torch.get_num_threads()
    assert told["ranks"] == 1
    sections = {section: told[section] for section in ("data", "model", "train", "logging")}
    assert config_from_dict(Config, sections) == cfg


def test_only_the_first_of_several_ranks_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    save_checkpoint(tmp_path / "checkpoint.pt", state_of(tiny_model()))
    add_rows(tmp_path, [{"step": 1}])
    add_rows(tmp_path, [{"step": 1}], afresh=True)
    write_run_config(tmp_path, None, None, None)
    assert new_run_folder(tmp_path / "outputs") is None and not list(tmp_path.iterdir())


# A tokenizer beside published weights


def bpe_model(folder, vocab_size=300, d_vocab=300):
    """A folder with a model of d_vocab tokens and a tokenizer of vocab_size; both, too."""
    tokenizer = BPETokenizer().train(corpus.text(5000), vocab_size)
    model = tiny_model(d_vocab=d_vocab, tie_embeddings=True)
    export_pretrained(folder, model, tokenizer)
    return model, tokenizer


def test_an_exported_model_and_its_tokenizer_come_back(tmp_path):
    model, tokenizer = bpe_model(tmp_path)
    again, its_tokenizer = load_model(str(tmp_path))
    assert same_logits(again, model)
    assert its_tokenizer.state_dict() == tokenizer.state_dict()


def test_an_export_is_not_mixed_with_the_tokenizer_that_was_there(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 300}')
    _, tokenizer = bpe_model(tmp_path)
    assert load_model(str(tmp_path))[1].state_dict() == tokenizer.state_dict()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        assert name in refusal(lambda: bpe_model(tmp_path))
        (tmp_path / name).unlink()


def test_a_tokenizer_of_fewer_tokens_than_the_model_is_used_and_one_of_more_refused(tmp_path):
    bpe_model(tmp_path / "more", d_vocab=301)
    assert load_model(str(tmp_path / "more"))[1].d_vocab == 300
    bpe_model(tmp_path / "fewer", d_vocab=299)
    message = refusal(lambda: load_model(str(tmp_path / "fewer")))
    assert "300 tokens" in message and "299" in message


def test_a_model_of_another_kind_of_tokenizer_is_not_exported(tmp_path):
    assert "'char'" in refusal(lambda: export_pretrained(tmp_path / "x", tiny_model(), TOKENIZER))
    assert not (tmp_path / "x").exists()


def test_gpt2s_tokenizer_is_used_only_if_there_is_none_and_a_message_says_so(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "GPT2_TOKENS", 300)
    monkeypatch.setattr(checkpoint, "GPT2_BPE", tmp_path / "gpt2_bpe")
    model, _ = bpe_model(tmp_path / "gpt2_bpe")
    model.save_pretrained(tmp_path / "bare")
    assert load_model(str(tmp_path / "bare"))[1].d_vocab == 300
    assert "using GPT-2's" in capsys.readouterr().err
    bpe_model(tmp_path / "own", vocab_size=280)
    assert load_model(str(tmp_path / "own"))[1].d_vocab == 280
    tiny_model(d_vocab=299).save_pretrained(tmp_path / "other")
    assert load_model(str(tmp_path / "other"))[1] is None
    assert "vocab.json" in refusal(lambda: checkpoint.load_pretrained(tmp_path / "other"))


def test_a_run_does_not_count_as_published_weights(tmp_path):
    save_run(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    for remains in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / "mine" / remains).touch()
        for load in (checkpoint.load_pretrained, checkpoint.load_from_elsewhere):
            assert "mine is a run" in refusal(lambda load=load: load(tmp_path / "mine")), remains
        (tmp_path / "mine" / remains).unlink()


def test_a_model_that_is_no_name_is_refused_with_its_value():
    for given in (5, True, torch.zeros(2), ["gpt2"]):
        refusal(lambda given=given: load_model(given), f"given as {given!r}"[:20])
