"""Token files: the same ids wherever a text is cut, and whenever the work is stopped."""

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import refusal, tiny_model

import corpus
import data
import documents
import token_files
from checkpoint import export_pretrained, load_model
from config import DataConfig
from data import load_dataset, random_batch, windows_in_order
from token_files import (
    TOKENS_FILE,
    PieceEncoder,
    PrepareConfig,
    TokenFile,
    prepare,
    read_token_file,
)
from tokenizer import BPETokenizer, CharTokenizer, show_bytes, split_words
from utils import locked, run_program, seeded_generator

ROOT = Path(__file__).resolve().parent.parent
AWKWARD = "I'll say: we've  seen\n\n  thé 日本語'll   🙂🙂 at 1234 'x'' don't\t\r\n" * 4


def texts(folder, *contents):
    """Paths of files with these texts."""
    paths = [folder / f"part-{i}.txt" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content.encode())
    return list(map(str, paths))


def prepared(folder, *contents, **how):
    """A DataConfig of the token file that is made of these texts, in folder/tokens."""
    prepare(texts(folder, *contents), PrepareConfig(out=str(folder / "tokens"), **how))
    return DataConfig(path=str(folder / "tokens"))


def encoded(pieces, tokenizer):
    """The ids of a text that comes in pieces."""
    encoder = PieceEncoder(tokenizer)
    return [i for piece in pieces for i in encoder.add(piece)] + encoder.finish()


def all_ids(folder):
    return read_token_file(folder / TOKENS_FILE)[0][:].tolist()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_prepared_ids_are_those_of_the_whole_text_wherever_it_is_cut(tmp_path, kind):
    cfg = PrepareConfig(kind, vocab_size=300, out=str(tmp_path))
    paths = texts(tmp_path, AWKWARD, "", "'ll " + AWKWARD)
    between = "<|endoftext|>" if kind == "bpe" else "\n\n"
    for size in (1, 2, 3, 5, 64, 1 << 20):
        n_tokens, tokenizer = prepare(paths, cfg, size)
        whole = tokenizer.encode_document(AWKWARD + between + "'ll " + AWKWARD)
        assert all_ids(tmp_path) == whole, f"{size} bytes at a time make other ids"
        assert len(whole) == n_tokens
        if kind == "char":
            assert tokenizer.symbols == CharTokenizer().fit(AWKWARD).symbols


def test_any_text_in_any_pieces_has_the_ids_of_the_whole():
    chance = random.Random(0)
    tokenizer = BPETokenizer().train(AWKWARD + "'ll 'll 've 've l'l l'l  '  ' " * 9, 330)
    for _ in range(3000):
        text = "".join(chance.choices("'lvesx1é \n\t.", k=chance.randint(0, 12)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 5)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = encoded(pieces, tokenizer)
        assert found == tokenizer.encode(text), pieces


def test_endoftext_is_found_wherever_a_document_is_cut():
    chance = random.Random(1)
    state = BPETokenizer().train(AWKWARD + "!<| ! <|e <|end <|endoftext|" * 9, 330).state_dict()
    state["tokens"].append("<|endoftext|>")
    tokenizer = BPETokenizer().load_state_dict(state)
    parts = ["<|endoftext|>", "<|endoftext|", "<|end", "<", "|", "'l", "l", " ", "  ", "\n", "!"]
    for _ in range(2000):
        text = "".join(chance.choices(parts, k=chance.randint(0, 8)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 9)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = encoded(pieces, tokenizer)
        assert found == tokenizer.encode(text, endoftext=True), pieces
        assert found.count(tokenizer.endoftext_id) == text.count("<|endoftext|>")


def test_added_tokens_are_found_wherever_a_document_is_cut():
    chance = random.Random(2)
    added = ["<|endoftext|>", "<p>", "<p>ad", "a b c", "c d", "d<p", " '"]  # they may overlap
    state = BPETokenizer().train(AWKWARD + "a b <p <p 'll 'll " * 9, 300).state_dict()
    state["tokens"] += [show_bytes(text.encode()) for text in added]
    tokenizer = BPETokenizer().load_state_dict(state | {"added": added[1:]})
    parts = [*added, "a", " b", " c", " d", "<", "p", ">", "'l", " ", "<|end"]
    for _ in range(3000):
        text = "".join(chance.choices(parts, k=chance.randint(0, 9)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 9)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert encoded(pieces, tokenizer) == tokenizer.encode_document(text), pieces


def test_a_long_word_in_many_pieces_is_not_split_again_at_each(monkeypatch):
    n_split = 0

    def counting(text):
        nonlocal n_split
        n_split += len(text)
        return split_words(text)

    monkeypatch.setattr(token_files, "split_words", counting)
    tokenizer = BPETokenizer().train("abab", 257)
    found = encoded(["ab"] * 2000, tokenizer)
    assert found == [256] * 2000
    assert n_split < 6 * 4000, f"{n_split} characters of a word of 4,000 were split"


def endoftext_files(folder):
    """GPT-2's two files, of a tokenizer that has one merge and `<|endoftext|>`; its id is 257."""
    state = BPETokenizer().train("abab", 257).state_dict()
    tokens = [*state["tokens"], "<|endoftext|>"]
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("a b\n")
    return str(folder)


def test_documents_are_joined_by_endoftext_or_by_a_blank_line(tmp_path):
    gpt2 = endoftext_files(tmp_path / "gpt2")
    paths = texts(tmp_path, "", "ab<|endoftext|>ab", "\ufeff", "\ufeffab", "ab")
    for size in (1, 2, 3, 1 << 20):
        prepare(paths, PrepareConfig(gpt2=gpt2, out=str(tmp_path)), size)
        assert all_ids(tmp_path) == [256, 257, 256, 257, 256, 257, 256], f"{size} bytes at a time"

    _, tokenizer = prepare(paths, PrepareConfig("bpe", vocab_size=256, out=str(tmp_path)))
    assert all_ids(tmp_path).count(tokenizer.endoftext_id) == 3 and tokenizer.d_vocab == 257
    _, tokenizer = prepare(paths, PrepareConfig(out=str(tmp_path)))
    assert tokenizer.decode(all_ids(tmp_path)) == "ab<|endoftext|>ab\n\nab\n\nab"

    told = refusal(lambda: prepare(texts(tmp_path, "", ""),
                                  PrepareConfig(gpt2=gpt2, out=str(tmp_path))))
    assert "no text found" in told


def test_bpe_of_one_document_learns_no_endoftext_and_of_several_nothing_from_it(tmp_path):
    text = "ab<|endoftext|>" * 40
    _, tokenizer = prepare(texts(tmp_path, text), PrepareConfig("bpe", 300, out=str(tmp_path)))
    assert not tokenizer.has_endoftext and len(all_ids(tmp_path)) > 40
    paths = texts(tmp_path, text, "ab")
    _, tokenizer = prepare(paths, PrepareConfig("bpe", 300, out=str(tmp_path)))
    assert tokenizer.symbols[256:] == [b"ab", b"<|endoftext|>"]
    assert all_ids(tmp_path) == [256, 257] * 40 + [257, 256]


def test_a_dataset_from_a_token_file_is_the_one_from_the_text(tmp_path):
    text = corpus.text(3000)
    whole = load_dataset(DataConfig(path=texts(tmp_path, text)[0], val_fraction=0.2), 8)
    cfg = prepared(tmp_path, text)
    parts = load_dataset(DataConfig(path=cfg.path, val_fraction=0.2), 8)
    for one, other in ((parts.train, whole.train), (parts.val, whole.val)):
        assert isinstance(one, TokenFile) and len(one) == len(other)
        assert torch.equal(one[:], other) and one[:].dtype == torch.int64
        for ids, again in zip(random_batch(one, 9, 5, seeded_generator(1)),
                              random_batch(other, 9, 5, seeded_generator(1)), strict=True):
            assert torch.equal(ids, again)
        for window, again in zip(windows_in_order(one, 7, 5), windows_in_order(other, 7, 5),
                                 strict=True):
            assert all(map(torch.equal, window, again))
    assert parts.tokenizer.state_dict() == whole.tokenizer.state_dict()
    assert parts.val_characters == whole.val_characters and parts.floor is None


def test_the_characters_of_a_validation_part_are_counted_whatever_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "PIECE_SIZE", 5)  # ids at once, so that characters are cut
    cfg = prepared(tmp_path, AWKWARD * 3, tokenizer="bpe", vocab_size=260)
    dataset = load_dataset(cfg, 8)
    begins = [byte & 0xC0 != 0x80 for byte in dataset.tokenizer.to_bytes(dataset.val[:])]
    assert dataset.val_characters == sum(begins) < len(begins)


def test_many_symbols_take_four_bytes_each_and_few_take_two(tmp_path):
    many = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    for text, size, dtype in ((many, 4, "uint32"), (many[: 1 << 16], 2, "uint16")):
        path = Path(prepared(tmp_path, text).path) / TOKENS_FILE
        header = path.read_bytes().split(b"\n")[0]
        assert json.loads(header)["dtype"] == dtype
        assert path.stat().st_size == len(header) + 1 + size * len(text)
        assert all_ids(path.parent) == list(range(len(text)))


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_published_files_are_taken_from_their_folder(tmp_path, names):
    state = BPETokenizer().train(AWKWARD, 280).state_dict()
    ids = {token: i for i, token in enumerate(state["tokens"])}
    (tmp_path / names[0]).write_text(json.dumps(ids), encoding="utf-8")
    merges = "\n".join(map(" ".join, state["merges"]))
    (tmp_path / names[1]).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    cfg = prepared(tmp_path, AWKWARD, gpt2=str(tmp_path))
    assert load_dataset(cfg, 8).tokenizer.state_dict() == state


def test_the_tokenizer_of_a_models_folder_is_taken_whole(tmp_path):
    tokenizer = BPETokenizer().train(AWKWARD, 280)
    state = tokenizer.state_dict()
    state |= {"tokens": [*state["tokens"], "<s>"], "added": ["<s>"]}
    model = tiny_model(d_vocab=len(state["tokens"]))
    export_pretrained(tmp_path / "model", model, BPETokenizer().load_state_dict(state))
    cfg = prepared(tmp_path, "<s>" + AWKWARD, gpt2=str(tmp_path / "model"))
    dataset = load_dataset(cfg, 8)
    assert dataset.tokenizer.state_dict() == state == load_model(tmp_path / "model")[1].state_dict()
    assert dataset.train[:1].tolist() == [tokenizer.d_vocab]


def test_bpe_learns_from_the_beginning_and_never_from_what_validates(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BPE_SAMPLE_SIZE", 4 * token_files.PIECE_SIZE)
    for first, second in (("ab", "xy"), ("éà", "ñü")):  # of one byte and of two
        cfg = prepared(tmp_path, first * 200 + second * 200, tokenizer="bpe", vocab_size=300)
        learned = load_dataset(cfg, 8).tokenizer.symbols[256:]
        assert learned and not any(second[0].encode() in token for token in learned)


def test_a_file_prepared_anew_does_not_change_what_is_trained_on(tmp_path):
    dataset = load_dataset(prepared(tmp_path, "abcd" * 100), 8)
    before = dataset.train[:20]
    prepared(tmp_path, "dcba" * 50)
    assert torch.equal(dataset.train[:20], before) and not torch.equal(
        load_dataset(prepared(tmp_path, "dcba" * 100), 8).train[:20], before)


def test_the_file_in_the_folder_means_its_folder(tmp_path):
    cfg = prepared(tmp_path, "abcd" * 100)
    named = dataclasses.replace(cfg, path=f"{cfg.path}/{TOKENS_FILE}")
    one = load_dataset(cfg, 8)
    other = load_dataset(named, 8)
    assert torch.equal(one.train[:99], other.train[:99]) and one.sha256 == other.sha256


def test_the_program_says_how_to_train_on_its_file(tmp_path, capsys):
    data.main(["prepare", *texts(tmp_path, "ab" * 50), "--out", str(tmp_path / "mine")])
    out, err = capsys.readouterr()
    assert out.startswith("100 characters of a vocabulary of 2; ")
    assert out.endswith(f"python train.py --data.path {tmp_path / 'mine'}\n")
    assert "100/100 bytes  made tokens" in err


def test_a_text_that_cannot_be_prepared_gives_one_line_and_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path, "ab" * 50, "")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "empty").mkdir()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    for words, told in [
        ("prepare missing.txt", "missing.txt: No such file"),
        ("prepare part-0.txt missing.txt --tokenizer bpe", "missing.txt: No such file"),
        ("prepare part-1.txt", "part-1.txt"),
        ("prepare bad.txt", "bad.txt is not UTF-8 (byte 1 is 0xff)"),
        ("prepare empty", "empty has no texts"),
        ("prepare - -", "- is given twice"),
        ("prepare", "PATH"),
        ("squeeze part-0.txt", "'squeeze'"),
        ("prepare part-0.txt --tokenizer words", "'words'"),
        ("prepare part-0.txt --tokenizer bpe --vocab_size 9", "vocab_size=9"),
        ("prepare part-0.txt --gpt2 nowhere", "nowhere has no tokenizer"),
        ("prepare part-0.txt --tokeniser bpe", "--tokenizer"),
        ("prepare part-0.txt --out part-0.txt", "cannot write part-0.txt"),
    ]:
        flags = words.split()
        if "--out" not in flags:
            flags += ["--out", "mine"]
        with pytest.raises(SystemExit) as exit_:
            run_program(partial(data.main, flags))
        lines = [line for line in capsys.readouterr().err.splitlines() if "bytes  " not in line]
        assert exit_.value.code == 2 and len(lines) == 1 and told in lines[0], (words, lines)
        left = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert left == before, f"{words} leaves files"


def test_an_interrupted_preparation_leaves_the_old_file(tmp_path, monkeypatch):
    cfg = prepared(tmp_path, "ab" * 50)
    before = all_ids(Path(cfg.path))
    monkeypatch.setattr(PieceEncoder, "finish", lambda encoder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, "cd" * 50)
    monkeypatch.undo()
    assert all_ids(Path(cfg.path)) == before


# The same documents, stored otherwise


def content_of(paths, out, size=1 << 18, **how):
    """The bytes of the token file that is made of these paths; nothing else may be left there."""
    prepare(paths, PrepareConfig(out=str(out), **how), size)
    assert [path.name for path in out.iterdir()] == [TOKENS_FILE]
    return (out / TOKENS_FILE).read_bytes()


def tokenizers(folder):
    """Settings for each kind of tokenizer."""
    return [{"tokenizer": "char"}, {"tokenizer": "bpe", "vocab_size": 280},
            {"gpt2": endoftext_files(folder / "gpt2")}]


def test_the_ids_do_not_depend_on_how_documents_are_stored(tmp_path):
    contents = [AWKWARD, "ab<|endoftext|>ab", "", "ab\n", "日本'll"]
    folder = tmp_path / "texts"
    folder.mkdir()
    paths = texts(folder, *contents)
    lines = "\n".join(json.dumps({"body": text}) for text in contents).encode()
    (tmp_path / "lines.jsonl").write_bytes(lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    packed = [str(tmp_path / f"{number}.txt.gz") for number in range(len(contents))]
    for path, text in zip(packed, contents, strict=True):
        Path(path).write_bytes(gzip.compress(text.encode()))

    for how in tokenizers(tmp_path):
        wanted = content_of(paths, tmp_path / "out", **how)
        _, tokenizer, _ = read_token_file(tmp_path / "out" / TOKENS_FILE)
        between = "<|endoftext|>" if tokenizer.has_endoftext else "\n\n"
        text = between.join(filter(None, contents))
        assert all_ids(tmp_path / "out") == tokenizer.encode_document(text), how
        for other in ([str(folder)], packed, [str(tmp_path / "lines.jsonl")],
                      [str(tmp_path / "lines.jsonl.gz")]):
            field = {"field": "body"} if "lines" in other[0] else {}
            found = content_of(other, tmp_path / "out", **field, **how)
            assert found == wanted, f"{other} with {how}"


def test_stdin_has_the_ids_of_a_file(tmp_path, monkeypatch):
    path, other = texts(tmp_path, AWKWARD, "ab")
    for how in tokenizers(tmp_path):
        for around in ([], [other]):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(AWKWARD.encode())))
            found = content_of([*around, "-", *around], tmp_path / "out", **how)
            assert found == content_of([*around, path, *around], tmp_path / "out", **how), how


def test_a_closed_stdin_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it when the shell says <&-
    cfg = PrepareConfig(out=str(tmp_path / "out"))
    assert "stdin is closed" in refusal(lambda: prepare(["-"], cfg))


def test_bytes_of_stdin_that_are_not_text_are_named_and_no_copy_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab\xff")))
    message = refusal(lambda: prepare(["-"], PrepareConfig(out=str(tmp_path))))
    assert "stdin is not UTF-8 (byte 2 is 0xff)" in message and not list(tmp_path.iterdir())


def test_a_word_too_long_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "LONGEST_WORD", 50)
    paths = texts(tmp_path, "a " * 100 + "b" * 200)
    assert content_of(paths, tmp_path / "out", size=8)
    message = refusal(lambda: content_of(paths, tmp_path / "out", 8, tokenizer="bpe"))
    assert "more than 50 characters" in message and "--tokenizer char" in message


# Work that is stopped, and goes on


class Killed(BaseException):
    """Ends `prepare` where a kill would."""


class Steps:
    """Counts what `prepare` does, and raises at one of the steps.

    A step is each end of a call that changes something on the disk or in memory.
    """

    def __init__(self, patch, last=None):
        self.last = last
        self.n_steps = 0
        self.n_pieces = 0  # of text that were read
        patch.setattr(token_files, "SECONDS_BETWEEN_NOTES", 0)
        patch.setattr(os, "fsync", self.around(lambda descriptor: None))  # tests need no disk
        patch.setattr(os, "replace", self.around(os.replace))
        patch.setattr(token_files, "write_json", self.around(token_files.write_json))
        patch.setattr(token_files.TokenWriter, "append",
                      self.around(token_files.TokenWriter.append))
        patch.setattr(token_files.TokenWriter, "write_header",
                      self.around(token_files.TokenWriter.write_header))
        patch.setattr(token_files, "document_pieces", self.pieces)
        self.original = documents.document_pieces

    def step(self):
        self.n_steps += 1
        if self.n_steps == self.last:
            raise Killed

    def around(self, function):
        def call(*args, **more):
            self.step()
            result = function(*args, **more)
            self.step()
            return result
        return call

    def pieces(self, *args, **more):
        for piece in self.original(*args, **more):
            self.step()
            self.n_pieces += 1
            yield piece


def mixed_files(folder):
    """Paths of texts of all kinds, two of which have most of the text."""
    lines = "\n".join(json.dumps({"text": text}) for text in ("a", "", "'ll  b", "é" * 9)).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "packed.txt.gz").write_bytes(gzip.compress("日本 <|endoftext|> x'l".encode()))
    names = ("lines.jsonl", "packed.jsonl.gz", "packed.txt.gz")
    return [*texts(folder, "\ufeffab cd'l"), *(str(folder / name) for name in names)]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["char", "bpe", "gpt2"])
@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_work_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path, monkeypatch, number, every):
    paths = mixed_files(tmp_path)
    how = tokenizers(tmp_path)[number]
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        wanted = content_of(paths, tmp_path / "out", 5, **how)

    for last in range(every // 2 + 1, steps.n_steps + 1, every):
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch:
            first = Steps(patch, last)
            with pytest.raises(Killed):
                content_of(paths, out, 5, **how)
        with monkeypatch.context() as patch:
            second = Steps(patch)
            assert content_of(paths, out, 5, **how) == wanted, f"killed at step {last}"

        # What was noted is not done again: of the pieces, two at most
        if last < steps.n_steps - 4:  # from there on the token file is in its place
            assert first.n_pieces + second.n_pieces <= steps.n_pieces + 2, f"killed at step {last}"


def test_work_killed_again_and_again_comes_to_an_end(tmp_path, monkeypatch, capsys):
    paths = mixed_files(tmp_path)
    wanted = content_of(paths, tmp_path / "whole")
    for _ in range(100):
        with monkeypatch.context() as patch:
            Steps(patch, last=40)
            try:
                found = content_of(paths, tmp_path / "out", 5)
                break
            except Killed:
                continue
    assert found == wanted
    assert capsys.readouterr().err.count("going on where the last run stopped") > 2


def unfinished(folder, monkeypatch, paths, last=120, **how):
    """Kills `prepare` in the middle; returns the folder's note, a dict."""
    with monkeypatch.context() as patch:
        Steps(patch, last)
        with pytest.raises(Killed):
            content_of(paths, folder, 5, **how)
    return json.loads((folder / f".{TOKENS_FILE}.note").read_text())


def test_a_field_without_json_lines_is_refused(tmp_path):
    cfg = PrepareConfig(field="body", out=str(tmp_path / "out"))
    assert "--field body is for files of JSON lines" in refusal(
        lambda: prepare(texts(tmp_path, "a text"), cfg))


def test_unfinished_work_of_other_files_or_settings_is_not_gone_on_with(
        tmp_path, monkeypatch, capsys):
    for case, changed in {
        "another setting": "other vocab_size:",
        "another field": "other field and files:",
        "another tokenizer": "other tokenizer:",
        "other files": "other files:",
        "a longer file": "other files:",
        "a newer file": "other files:",
        "stdin": "other stdin:",
        "ids changed": "is damaged (its ids have changed)",
        "ids missing": "is damaged (its ids have changed)",
        "no ids": "is damaged",
        "no note": "is damaged",
        "another note": "is damaged",
    }.items():
        folder = tmp_path / case
        folder.mkdir()
        paths = mixed_files(folder)
        out = folder / "out"
        how = {"tokenizer": "bpe", "vocab_size": 260}
        assert unfinished(out, monkeypatch, paths, **how)["n_tokens"] > 5
        partial_file = out / f".{TOKENS_FILE}.partial"
        note = out / f".{TOKENS_FILE}.note"
        capsys.readouterr()

        if case == "another setting":
            how["vocab_size"] = 261
        elif case == "another field":
            how["field"] = "text2"
            edit(folder / "lines.jsonl", lambda content: content.replace(b"text", b"text2"))
            paths = [str(folder / "lines.jsonl")]
        elif case == "another tokenizer":
            how["tokenizer"] = "char"
        elif case == "other files":
            paths = paths[::-1]
        elif case == "a longer file":
            edit(Path(paths[-1]), lambda content: content + gzip.compress(b"more"))
        elif case == "a newer file":
            os.utime(paths[0], ns=(1, 1))
        elif case == "stdin":
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab")))
            paths[0] = "-"
        elif case == "ids changed":
            edit(partial_file, lambda content: content.replace(b"}\n", b"}\n\1", 1))
        elif case == "ids missing":
            edit(partial_file, lambda content: content[: content.index(b"\n") + 4])
        elif case == "no ids":
            partial_file.unlink()
        elif case == "no note":
            note.write_text("{")
        elif case == "another note":
            note.write_text("{}")

        found = content_of(paths, out, 5, **how)
        err = capsys.readouterr().err
        assert changed in err and "starting again" in err, (case, err)
        if case == "stdin":
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab")))
        assert found == content_of(paths, folder / "fresh", **how), case


def test_what_was_written_after_the_note_is_written_again(tmp_path, monkeypatch):
    paths = mixed_files(tmp_path)
    unfinished(tmp_path / "out", monkeypatch, paths)
    edit(tmp_path / "out" / f".{TOKENS_FILE}.partial", lambda content: content + b"\1" * 999)
    assert content_of(paths, tmp_path / "out") == content_of(paths, tmp_path / "whole")


def test_a_full_disk_keeps_what_is_done_and_a_bad_text_does_not(tmp_path, monkeypatch, capsys):
    paths = mixed_files(tmp_path)
    wanted = content_of(paths, tmp_path / "whole")
    n_appended = 0
    append = token_files.TokenWriter.append

    def fail(writer, ids):
        nonlocal n_appended
        n_appended += 1
        if n_appended == 4:
            raise OSError(28, "No space left on device")
        append(writer, ids)

    with monkeypatch.context() as patch:
        Steps(patch)
        patch.setattr(token_files.TokenWriter, "append", fail)
        message = refusal(lambda: content_of(paths, tmp_path / "out", 5))
    assert "No space left" in message and "make room" in message
    assert content_of(paths, tmp_path / "out") == wanted
    assert "going on" in capsys.readouterr().err

    Path(paths[-1]).write_bytes(gzip.compress(b"ab")[:-4])
    with monkeypatch.context() as patch:
        Steps(patch)
        assert paths[-1] in refusal(lambda: content_of(paths, tmp_path / "out", 5))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TOKENS_FILE]
    assert (tmp_path / "out" / TOKENS_FILE).read_bytes() == wanted


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path):
    paths = texts(tmp_path, "ab")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / f".{TOKENS_FILE}.lock", "busy"):
        message = refusal(lambda: content_of(paths, tmp_path / "out"))
    assert "another process" in message and "--out" in message
    assert content_of(paths, tmp_path / "out")


def test_ctrl_c_says_that_the_command_goes_on(tmp_path, monkeypatch, capsys):
    flags = ["prepare", *texts(tmp_path, "ab" * 50), "--out", str(tmp_path / "out")]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(PieceEncoder, "finish", stop)
    with pytest.raises(SystemExit):
        run_program(partial(data.main, flags))
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_process_killed_again_and_again_makes_the_bytes_of_one_that_was_not(
        tmp_path, monkeypatch, kind):
    text = corpus.text(200_000) * (40 if kind == "char" else 8)
    lines = "\n".join(json.dumps({"text": line}) for line in text[:300_000].split("\n"))
    paths = texts(tmp_path, text)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    paths.append(str(tmp_path / "lines.jsonl.gz"))
    monkeypatch.setattr(token_files, "SECONDS_BETWEEN_NOTES", 0.02)
    start = time.monotonic()
    wanted = content_of(paths, tmp_path / "whole", 4096, tokenizer=kind)
    seconds = time.monotonic() - start

    # Each process has longer than the one before
    out = tmp_path / "out"
    n_resumed = 0
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 100):
        n_resumed += (out / f".{TOKENS_FILE}.note").exists()
        process = multiprocessing.get_context("fork").Process(
            target=content_of, args=(paths, out, 4096), kwargs={"tokenizer": kind})
        process.start()
        process.join(share * seconds)
        process.kill()
        process.join()
    assert process.exitcode == 0 and n_resumed > 1
    assert (out / TOKENS_FILE).read_bytes() == wanted


# Damaged token files


def edit(path, change):
    """Rewrite the file, with its bytes changed by a function."""
    path.write_bytes(change(path.read_bytes()))


def edit_header(path, **changes):
    """Changes values of a token file's header, and leaves its ids."""
    line, _, ids = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(line) | changes).encode() + b"\n" + ids)


def with_last_id(i):
    """A function of a token file's bytes: another last id."""
    return lambda content: content[:-2] + np.uint16(i).tobytes()


def tokenizer_state(characters):
    """The state of a tokenizer of these characters in a token file's header."""
    return CharTokenizer().fit(characters).state_dict()


BROKEN = "is cut off or not a token file"
CHANGED = "has changed since it was made"
DAMAGE = {  # what is done to a token file of 100 ids, 0 and 1, and what is told
    "the end cut off": (lambda path: edit(path, lambda content: content[:-3]), "instead of 100"),
    "most cut off": (lambda path: edit(path, lambda content: content[:40]), BROKEN),
    "longer": (lambda path: edit(path, lambda content: content + b"\0\0"), "101 ids instead"),
    "an id too large": (lambda path: edit(path, with_last_id(2)), "0 to 1"),
    "another id": (lambda path: edit(path, with_last_id(0)), CHANGED),
    "other symbols, as many":
        (lambda path: edit_header(path, tokenizer=tokenizer_state("cd")), CHANGED),
    "fewer symbols": (lambda path: edit_header(path, tokenizer=tokenizer_state("a")), "0 to 0"),
    "other numbers, as long": (lambda path: edit_header(path, dtype="float16"), BROKEN),
    "no tokenizer": (lambda path: edit_header(path, tokenizer="gpt2"), BROKEN),
    "plain text": (lambda path: path.write_text("hello"), BROKEN),
    "nothing": (lambda path: path.write_bytes(b""), BROKEN),
    "a list": (lambda path: path.write_text("[1, 2]\n"), BROKEN),
    "nested without end": (lambda path: path.write_text("[" * 100_000 + "\n"), BROKEN),
    "infinitely many": (lambda path: edit_header(path, n_tokens=float("inf")), BROKEN),
    "more than any disk has": (lambda path: edit_header(path, n_tokens=10**4000), "100 ids in"),
    "numbers that are a list": (lambda path: edit_header(path, dtype=["uint16"]), BROKEN),
    "no checksum": (lambda path: edit_header(path, sha256=None), CHANGED),
}


def test_a_damaged_token_file_is_refused_with_the_damage(tmp_path):
    for case, (damage, told) in DAMAGE.items():
        cfg = prepared(tmp_path, "ab" * 50)
        damage(Path(cfg.path) / TOKENS_FILE)
        message = refusal(partial(load_dataset, cfg, 4), case)
        assert "tokens.bin" in message and told in message and "data.py prepare" in message, case


def test_damage_that_changes_the_text_is_noticed_too(tmp_path):
    cfg = prepared(tmp_path, AWKWARD * 3, tokenizer="bpe", vocab_size=260)
    edit(Path(cfg.path) / TOKENS_FILE, with_last_id(0))
    assert CHANGED in refusal(lambda: load_dataset(cfg, 4))


def test_another_tokenizer_than_the_flag_s_or_the_run_s_is_refused(tmp_path):
    path = prepared(tmp_path, "ab" * 50).path
    message = refusal(lambda: load_dataset(DataConfig(path=path, tokenizer="bpe"), 4))
    assert "--tokenizer char" in message and "--data.tokenizer bpe" in message
    assert load_dataset(DataConfig(path=path), 4, CharTokenizer().fit("ab"))
    other = CharTokenizer().fit("abc")
    assert path in refusal(lambda: load_dataset(DataConfig(path=path), 4, other))


def test_a_token_file_that_is_too_short_gets_the_message_of_a_text(tmp_path):
    cfg = prepared(tmp_path, "ab" * 50)
    assert "validation part has 10 tokens" in refusal(lambda: load_dataset(cfg, 10))


MEASURED = """
import sys
import data, train

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
(data if sys.argv[1] == "prepare" else train).main(sys.argv[1:])
print("added MB:", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux")
def test_a_text_of_50_megabytes_adds_less_than_100_to_the_memory(tmp_path):
    """Measured in a process of its own, from what importing everything takes."""
    (tmp_path / "text.txt").write_text(corpus.text(1_000_000) * 50, encoding="utf-8")
    assert (tmp_path / "text.txt").stat().st_size > 49e6
    tiny = ("--model.n_layers 1 --model.n_heads 2 --model.d_model 8 --model.n_ctx 32 "
            "--train.max_steps 300 --train.device cpu --train.threads 1 --data.val_fraction 0.001")
    for flags in (["prepare", "text.txt", "--out", "tokens"],
                  ["--data.path", "tokens", *tiny.split()]):
        ran = subprocess.run([sys.executable, "-c", MEASURED, *flags], cwd=tmp_path, text=True,
                             capture_output=True, env={"PYTHONPATH": str(ROOT)}, timeout=200)
        assert ran.returncode == 0, ran.stderr
        assert float(ran.stdout.split("added MB:")[1]) < 100


