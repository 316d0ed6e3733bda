"""Token files: the same ids wherever a text is cut, and whenever the work is stopped."""

import dataclasses
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import refusal

import corpus
import data
import token_files
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
from tokenizer import BPETokenizer, CharTokenizer, split_words
from utils import run_program, seeded_generator

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
        ("prepare part-0.txt --gpt2 nowhere", "cannot read nowhere/encoder.json"),
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


