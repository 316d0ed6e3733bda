"""Texts found, fetched from a server on this machine, split, and cut into windows."""

import dataclasses
import functools
import http.server
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal

import corpus
import data
from config import DataConfig
from data import (
    TOKENS_FILE,
    NoNetwork,
    PrepareConfig,
    TokenFile,
    download_verified,
    encode_pieces,
    fit_tokenizer,
    load_dataset,
    load_text,
    prepare,
    random_batch,
    read_token_file,
    repeated_batch,
    sha256_of,
    tiny_shakespeare,
    windows_in_order,
)
from tokenizer import BPETokenizer, CharTokenizer, split_words
from utils import UserError, read_text, run_program, seeded_generator, text_pieces

ROOT = Path(__file__).resolve().parent.parent
GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 2000  # several pieces
REMEDY = "do something else"


# Windows


@pytest.mark.parametrize("starts", [None, [0], [0, 3, 5, 11, 12, 14], [1, 6, 19], [2, 9, 30]])
def test_windows_in_order_predict_each_token_after_the_first_once(starts):
    lengths = [2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 21, 26, 31]
    for n_tokens, batch_size in itertools.product(lengths, [1, 3, 100]):
        tokens = torch.arange(n_tokens)
        targets = []
        for inputs, wanted, counted in windows_in_order(tokens, batch_size, 5, starts):
            assert 1 <= len(inputs) <= batch_size and inputs.shape[1] == 5
            assert torch.equal(inputs[counted] + 1, wanted[counted])  # a target follows its input
            # What counts comes first, and is contiguous
            assert torch.equal(counted.long().cummin(1).values, counted.long())
            rows = inputs[:, :1] + torch.arange(5)
            assert torch.equal(inputs[counted], rows[counted])
            targets.append(wanted[counted])
        predicted = torch.cat(targets).tolist()
        assert predicted == list(range(1, n_tokens)), f"{n_tokens} tokens, {batch_size} at once"


def test_windows_are_full_except_the_last():
    counts = [counted.sum().item() for *_, counted in windows_in_order(torch.arange(20), 1, 5)]
    assert counts == [5, 5, 5, 4]


def test_a_window_begins_at_a_story_wherever_it_can():
    """Stories at 0, 3, 5, 11: two fit into the first window, the one of six not into any."""
    begins = [inputs[0, 0].item() for inputs, *_ in
              windows_in_order(torch.arange(18), 1, 5, starts=[0, 3, 5, 11])]
    assert begins == [0, 5, 10, 11, 16]


def test_a_repeated_window_is_random_once_and_from_then_on_known():
    inputs, targets = repeated_batch(1000, 64, 40, seeded_generator(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = torch.cat([inputs[:, :1], targets], 1)
    periods = [next(p for p in range(1, 41) if torch.equal(row[p:], row[:-p])) for row in windows]
    assert min(periods) >= 4 and max(periods) <= 20 and len(set(periods)) > 10
    assert all(len(set(row[:p].tolist())) > 0.7 * p for row, p in zip(windows, periods,
                                                                       strict=True))


def test_a_window_that_is_too_short_to_repeat_is_random():
    for n_ctx in (1, 2, 7, 8):
        inputs, targets = repeated_batch(3, 5, n_ctx, seeded_generator(0))
        assert inputs.shape == targets.shape == (5, n_ctx)


def test_a_random_batch_is_contiguous_and_its_targets_are_one_token_later():
    tokens = torch.arange(100, 140)
    inputs, targets = random_batch(tokens, 8, 6, seeded_generator(0))
    assert inputs.shape == (8, 6) and torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(6))
    assert 100 <= inputs.min() and targets.max() <= 139


def test_random_windows_start_everywhere_equally_often():
    draws = 6000
    tokens = torch.arange(12)  # 12 - 4 = 8 starts, the last of which ends at 11
    inputs, targets = random_batch(tokens, draws, 4, seeded_generator(0))
    counts = Counter(inputs[:, 0].tolist())
    assert sorted(counts) == list(range(8)) and targets.max() == 11
    error = (draws * (1 / 8) * (7 / 8)) ** 0.5
    assert all(abs(n - draws / 8) < 4 * error for n in counts.values())


def test_the_smallest_text_has_one_window():
    inputs, targets = random_batch(torch.arange(5), 3, 4, seeded_generator(0))
    assert inputs.tolist() == [[0, 1, 2, 3]] * 3 and targets.tolist() == [[1, 2, 3, 4]] * 3


def test_a_batch_depends_on_its_generator_alone():
    state = torch.random.get_rng_state()
    generator = seeded_generator(7)
    first, second = (random_batch(torch.arange(999), 4, 5, generator)[0] for _ in range(2))
    again = random_batch(torch.arange(999), 4, 5, seeded_generator(7))[0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


# A text becomes a dataset


def file_config(tmp_path, content, **changes):
    (tmp_path / "text.txt").write_bytes(content)
    return DataConfig(path=str(tmp_path / "text.txt"), **changes)


def test_validation_is_the_end_of_the_text_and_nothing_is_lost(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(203)) + "é\n"
    for val_fraction in (0.1, 0.25, 0.5):
        dataset = load_dataset(file_config(tmp_path, text.encode(), val_fraction=val_fraction), 8)
        train, val = (dataset.tokenizer.decode(part) for part in (dataset.train, dataset.val))
        assert train + val == text and len(val) == int(205 * val_fraction)
        assert dataset.train.dtype == torch.int64
        assert dataset.name == "text.txt" and dataset.sha256 == sha256_of(text.encode())


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_the_two_parts_have_the_tokens_of_the_whole_text(tmp_path, kind):
    text = "One, two  threes!\n\tIt's \u65e5\u672c 4,000 good-byes;\x1c I'll say (again).\n" * 3
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        cfg = file_config(tmp_path, text.encode(), tokenizer=kind, val_fraction=share)
        dataset = load_dataset(cfg, 8)
        tokens = [*dataset.train.tolist(), *dataset.val.tolist()]
        assert tokens == dataset.tokenizer.encode(text), f"cut at {share}"
        assert int(len(text) * share) <= dataset.val_characters < len(text) * share + 14


def test_a_text_without_blanks_is_cut_where_it_was_asked_for(tmp_path):
    text = "".join(chr(0x4E00 + i * i % 997) for i in range(4000))
    dataset = load_dataset(
        file_config(tmp_path, text.encode(), tokenizer="bpe", vocab_size=257), 8)
    assert dataset.val_characters == 400


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    tokenizer = CharTokenizer().fit("abcdefgh")
    dataset = load_dataset(file_config(tmp_path, b"hgfe" * 20), 4, tokenizer)
    assert dataset.tokenizer is tokenizer and dataset.train[:4].tolist() == [7, 6, 5, 4]


def test_a_given_tokenizer_that_lacks_a_character_is_refused_by_that_character(tmp_path):
    cfg = file_config(tmp_path, b"abz" * 20)
    assert "'z'" in refusal(lambda: load_dataset(cfg, 4, CharTokenizer().fit("ab")))


def test_each_part_must_fill_a_window_and_its_target(tmp_path):
    cfg = file_config(tmp_path, b"ab" * 30)
    assert len(load_dataset(cfg, 5).val) == 6
    assert "validation part has 6 tokens" in refusal(lambda: load_dataset(cfg, 6))
    cfg = file_config(tmp_path, b"ab" * 30, val_fraction=0.9)
    assert "training part has 6 tokens" in refusal(lambda: load_dataset(cfg, 6))


def test_a_size_of_vocabulary_that_does_nothing_is_refused(tmp_path):
    cfg = file_config(tmp_path, b"ab" * 30, vocab_size=300)
    assert "vocab_size=300" in refusal(lambda: load_dataset(cfg, 5))


def test_a_file_without_utf_8_text_is_refused_by_its_name(tmp_path):
    assert "text.txt is empty" in refusal(lambda: load_text(file_config(tmp_path, b"")))
    message = refusal(lambda: load_text(file_config(tmp_path, b"abc\xff\xfe")))
    assert "text.txt" in message and "byte 3 is 0xff" in message
    for path in (tmp_path / "missing.txt", tmp_path):
        assert str(path) in refusal(partial(load_text, DataConfig(path=str(path))), path)


def test_a_file_is_read_to_the_byte(tmp_path):
    text, _, _ = load_text(file_config(tmp_path, "ä\r\nb\tc\r".encode()))
    assert text == "ä\r\nb\tc\r"


def test_the_built_in_corpus_needs_no_network(monkeypatch):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 5000)
    monkeypatch.setattr(data, "tiny_shakespeare", None)
    text, name, _ = load_text(DataConfig(dataset="builtin"))
    assert text == corpus.text(5000) and "built-in" in name


# Downloads


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers each address with the next of its server's answers: (status, body, stated length)."""

    def do_GET(self):
        self.server.requested.append(self.path)
        answers = self.server.answers[self.path]
        status, body, length = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; requests go there directly and are tried again at once."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "download_verified", functools.partial(download_verified, pause=0))
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", sha256_of(GOOD))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.requested = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.answers = {"/good": [(200, GOOD, None)], "/wrong": [(200, b"not it", None)],
                      "/missing": [(404, b"not here", None)], "/cut": [(200, GOOD, 10**6)],
                      "/busy": [(503, b"later", None), (200, GOOD, None)]}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def nobody():
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/nothing"


def fetch_from(server, *paths):
    mirrors = [nobody() if path == "nobody" else server.url + path for path in paths]
    return data.download_verified(mirrors, sha256_of(GOOD), REMEDY)


@pytest.mark.parametrize(("paths", "requested"), [
    (["/good", "/wrong"], ["/good"]),
    (["/missing", "/good"], ["/missing", "/good"]),
    (["/wrong", "/good"], ["/wrong", "/good"]),
    (["/cut", "/good"], ["/cut", "/good"]),
    (["nobody", "/good"], ["/good"]),
    (["/busy"], ["/busy", "/busy"]),
], ids=["good", "missing", "wrong", "cut", "nobody", "busy"])
def test_the_first_mirror_with_the_right_content_is_taken(server, paths, requested):
    assert fetch_from(server, *paths) == GOOD
    assert server.requested == requested


def test_wrong_content_everywhere_is_refused_and_is_not_a_missing_network(server):
    for paths in (["/wrong"], ["/wrong", "nobody"], ["/missing", "/wrong"]):
        with pytest.raises(UserError) as caught:
            fetch_from(server, *paths)
        message = str(caught.value)
        assert "/wrong sent 6 bytes" in message and REMEDY in message, paths
        assert not isinstance(caught.value, NoNetwork), paths


def test_no_content_anywhere_is_a_missing_network(server):
    for paths in (["nobody"], ["nobody", "/missing"], ["/cut"]):
        with pytest.raises(NoNetwork, match=f"{len(paths)} mirrors .*; {REMEDY}"):
            fetch_from(server, *paths)


def test_a_mirror_is_tried_again_after_a_pause(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    assert download_verified([server.url + "/busy"], sha256_of(GOOD), REMEDY, pause=3.0) == GOOD
    assert [pause for pause in pauses if pause] == [3.0]


def test_shakespeare_is_downloaded_once_and_then_read_from_disk(server, tmp_path):
    texts = [tiny_shakespeare(tmp_path / "data", [server.url + "/good"]) for _ in range(2)]
    assert texts == [GOOD.decode()] * 2 and server.requested == ["/good"]
    assert (tmp_path / "data" / "tiny_shakespeare.txt").read_bytes() == GOOD


@pytest.mark.parametrize("path", ["/wrong", "/cut", "/missing"])
def test_a_failed_download_writes_nothing_and_names_another_text(server, tmp_path, path):
    message = refusal(lambda: tiny_shakespeare(tmp_path / "data", [server.url + path]))
    assert "--data.dataset builtin" in message
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob(".*"))


def test_a_file_that_is_not_shakespeare_is_refused_and_kept(server, tmp_path):
    path = tmp_path / "tiny_shakespeare.txt"
    for content in (GOOD + b" ", GOOD[:-1], b"something else"):
        path.write_bytes(content)
        message = refusal(lambda: tiny_shakespeare(tmp_path, [server.url + "/good"]), content[-9:])
        assert f"{path} is not Tiny Shakespeare" in message
        assert path.read_bytes() == content and not server.requested


def config_without_network(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 5000)
    monkeypatch.setattr(
        data, "tiny_shakespeare", functools.partial(tiny_shakespeare, mirrors=[nobody()]))
    return DataConfig(dataset=dataset, folder=str(tmp_path))


def test_auto_without_a_network_says_that_it_takes_the_built_in_corpus(
        server, tmp_path, monkeypatch, capsys):
    text, name, _ = load_text(config_without_network(tmp_path, monkeypatch, "auto"))
    assert text == corpus.text(5000) and "built-in" in name
    err = capsys.readouterr().err
    assert "WARNING: no network" in err and "built-in corpus instead" in err
    assert err.startswith("downloading"), "nothing was said while the network was tried"


def test_a_request_for_shakespeare_gets_no_other_text(server, tmp_path, monkeypatch):
    with pytest.raises(NoNetwork):
        load_text(config_without_network(tmp_path, monkeypatch, "tiny_shakespeare"))


@pytest.mark.parametrize("dataset", ["auto", "tiny_shakespeare"])
def test_a_text_on_disk_is_taken_without_a_network(server, tmp_path, monkeypatch, dataset, capsys):
    (tmp_path / "tiny_shakespeare.txt").write_bytes(GOOD)
    text, name, _ = load_text(config_without_network(tmp_path, monkeypatch, dataset))
    assert text == GOOD.decode() and name == "Tiny Shakespeare" and capsys.readouterr().err == ""


def test_auto_does_not_hide_a_wrong_file_behind_the_built_in_corpus(server, tmp_path, monkeypatch):
    (tmp_path / "tiny_shakespeare.txt").write_text("edited")
    cfg = config_without_network(tmp_path, monkeypatch, "auto")
    assert "tiny_shakespeare.txt" in refusal(lambda: load_text(cfg))


# The floor


@pytest.mark.parametrize("kind", ["char", "word"])
def test_the_floor_is_that_of_the_validation_tokens_one_by_one(monkeypatch, kind):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 30_000)
    dataset = load_dataset(DataConfig(dataset="builtin", tokenizer=kind), 16)
    floor = dataset.floor
    text = dataset.tokenizer.decode(dataset.val)
    assert len(floor.log_probs) == len(floor.categories) == len(dataset.val)
    assert text.startswith("\n")
    assert [i for i, token in enumerate(dataset.val.tolist())
            if dataset.tokenizer.decode([token]) == "\n"] == floor.starts
    sung = [dataset.tokenizer.decode([token]) for token, category
            in zip(dataset.val.tolist(), floor.categories, strict=True) if category == "copying"]
    songs = "".join(re.findall(r"again((?: \w\w)+\.)", text))
    wanted = songs if kind == "char" else songs.replace(".", " .").split()
    assert list(sung) == list(wanted)
    certain = [p == 0 for p, category in zip(floor.log_probs, floor.categories, strict=True)
               if category == "syntax"]
    assert all(certain)


def test_losses_at_the_floor_lie_nowhere_above_it(monkeypatch):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 30_000)
    floor = load_dataset(DataConfig(dataset="builtin"), 16).floor
    at_best = -floor.log_probs[1:].double()
    assert floor.above(at_best) == {kind: pytest.approx(0) for kind in ("all", *corpus.CATEGORIES)}
    worse = at_best + torch.tensor([category == "recall" for category in floor.categories[1:]])
    above = floor.above(worse)
    assert above.pop("recall") == pytest.approx(1) and 0 < above.pop("all") < 0.1
    assert all(nats == pytest.approx(0) for nats in above.values())


def test_a_category_that_does_not_occur_is_left_out():
    categories = ["recall", "syntax", "choice", "choice"]
    floor = corpus.Floor(torch.tensor([-1.0, 0, -2, -1]), categories, [])
    above = floor.above(torch.tensor([0.5, 2.5, 1.0]).double())
    assert above == {"all": pytest.approx(1 / 3), "syntax": 0.5, "choice": 0.25}


def test_bpe_does_not_learn_from_the_part_that_it_is_validated_on(tmp_path):
    text = "the cat sat there. " * 90 + "zyx wvu zyx wvu. " * 90
    dataset = load_dataset(file_config(tmp_path, text.encode(), tokenizer="bpe", vocab_size=270,
                                       val_fraction=0.5), 8)
    learned_from = dataset.tokenizer.decode(dataset.train)
    assert text.startswith(learned_from) and "zyx" in dataset.tokenizer.decode(dataset.val)
    expected = BPETokenizer().train(learned_from, 270)
    assert dataset.tokenizer.state_dict() == expected.state_dict()
    assert expected.state_dict() != BPETokenizer().train(text, 270).state_dict()


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_share_too_small_for_one_story_is_named(monkeypatch, kind):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 5000)
    for val_fraction, part in ((1e-9, "validation"), (0.99999, "training")):
        cfg = DataConfig(dataset="builtin", tokenizer=kind, val_fraction=val_fraction)
        message = refusal(partial(load_dataset, cfg, 16), part)
        assert re.search(rf"the {part} part has [01] tokens.*--data\.val_fraction", message)


def test_a_text_of_unknown_entropy_and_pieces_of_words_have_no_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 30_000)
    assert load_dataset(file_config(tmp_path, b"ab" * 30), 5).floor is None
    assert load_dataset(DataConfig(dataset="builtin", tokenizer="bpe"), 16).floor is None


# Token files

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


def all_ids(folder):
    return read_token_file(folder / TOKENS_FILE)[0][:].tolist()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_prepared_ids_are_those_of_the_whole_text_wherever_it_is_cut(tmp_path, kind):
    cfg = PrepareConfig(kind, vocab_size=300, out=str(tmp_path))
    paths = texts(tmp_path, AWKWARD, "", "'ll " + AWKWARD)
    for size in (1, 2, 3, 5, 64, 1 << 20):
        n_tokens, tokenizer = prepare(paths, cfg, size)
        whole = tokenizer.encode(AWKWARD + "'ll " + AWKWARD)
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
        found = [i for ids in encode_pieces(pieces, tokenizer) for i in ids]
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
        found = [i for ids in encode_pieces(pieces, tokenizer) for i in ids]
        assert found == tokenizer.encode(text, endoftext=True), pieces
        assert found.count(tokenizer.endoftext_id) == text.count("<|endoftext|>")


def test_a_long_word_in_many_pieces_is_not_split_again_at_each(monkeypatch):
    n_split = 0

    def counting(text):
        nonlocal n_split
        n_split += len(text)
        return split_words(text)

    monkeypatch.setattr("data.split_words", counting)
    tokenizer = BPETokenizer().train("abab", 257)
    found = [i for ids in encode_pieces(["ab"] * 2000, tokenizer) for i in ids]
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


def test_documents_are_joined_by_endoftext_where_the_tokenizer_has_it(tmp_path):
    gpt2 = endoftext_files(tmp_path / "gpt2")
    paths = texts(tmp_path, "", "ab<|endoftext|>ab", "\ufeff", "\ufeffab", "ab")
    for size in (1, 2, 3, 1 << 20):
        prepare(paths, PrepareConfig(gpt2=gpt2, out=str(tmp_path)), size)
        assert all_ids(tmp_path) == [256, 257, 256, 257, 256, 257, 256], f"{size} bytes at a time"
    for kind in ("char", "bpe"):
        _, tokenizer = prepare(paths, PrepareConfig(kind, vocab_size=256, out=str(tmp_path)))
        assert tokenizer.decode(all_ids(tmp_path)) == "ab<|endoftext|>ababab", kind
    told = refusal(lambda: prepare(texts(tmp_path, "", ""),
                                  PrepareConfig(gpt2=gpt2, out=str(tmp_path))))
    assert "no text found" in told


def test_a_text_read_whole_has_the_ids_of_its_documents(tmp_path):
    tokenizer = fit_tokenizer([], PrepareConfig(gpt2=endoftext_files(tmp_path / "gpt2")))
    cfg = file_config(tmp_path, b"ab<|endoftext|> ab\n" * 40)
    dataset = load_dataset(cfg, 4, tokenizer)
    for part in (dataset.train, dataset.val):
        assert 257 in part.tolist() and tokenizer.encode("<")[0] not in part.tolist()


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    marked = [mark + b"ab", b"", mark, mark + mark, "é\ufeff".encode()]
    paths = [tmp_path / f"{i}.txt" for i in range(len(marked))]
    for path, content in zip(paths, marked, strict=True):
        path.write_bytes(content)
    for size in (1, 2, 3, 4, 64):
        assert "".join(text_pieces(paths, size)) == "ab\ufeffé\ufeff", f"{size} bytes at a time"
    assert read_text(paths[0]) == "ab"
    assert "is empty" in refusal(lambda: read_text(paths[2]))
    for content, place in [(mark + b"ab\xff", "byte 5 is 0xff"), (mark[:2], "byte 0 is 0xef")]:
        paths[0].write_bytes(content)
        for size in (1, 2, 64):
            assert place in refusal(lambda size=size: list(text_pieces(paths, size)), content)


def test_a_text_comes_in_pieces_that_put_together_are_the_text(tmp_path):
    paths = texts(tmp_path, AWKWARD, "", "é")
    for size in (1, 2, 3, 7):
        assert "".join(text_pieces(paths, size)) == AWKWARD + "é", size


def test_bytes_that_are_not_utf_8_are_named_with_their_place_in_the_file(tmp_path):
    bad = tmp_path / "bad.txt"
    paths = [*texts(tmp_path, "fine"), str(bad)]
    for content, place in [
        (b"ab\xff", "byte 2 is 0xff"), ("aé".encode() + b"\xc3", "byte 3 is 0xc3"),
        ("é".encode() + b"\xe9 ", "byte 2 is 0xe9"),
        ("日本".encode()[:-1] + b" ", "byte 3 is 0xe6"),
    ]:
        bad.write_bytes(content)
        for size in (1, 2, 64):
            message = refusal(lambda size=size: list(text_pieces(paths, size)), content)
            assert str(bad) in message and place in message, f"{size} bytes at a time"


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
    monkeypatch.setattr(data, "PIECE_SIZE", 5)  # ids at once, so that characters are cut
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
    monkeypatch.setattr(data, "BPE_SAMPLE_SIZE", 4 * data.PIECE_SIZE)
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
    named = dataclasses.replace(cfg, path=f"{cfg.path}/{data.TOKENS_FILE}")
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
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    for words, told in [
        ("prepare missing.txt", "missing.txt: No such file"),
        ("prepare part-0.txt missing.txt --tokenizer bpe", "missing.txt: No such file"),
        ("prepare part-1.txt", "part-1.txt"),
        ("prepare bad.txt", "bad.txt is not UTF-8 (byte 1 is 0xff)"),
        ("prepare .", "cannot read .: Is a directory"),
        ("prepare", "FILE"),
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
    monkeypatch.setattr(data, "encode_pieces", lambda *args: iter([[0], 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, "cd" * 50)
    monkeypatch.undo()
    assert all_ids(Path(cfg.path)) == before and len(list(Path(cfg.path).iterdir())) == 1


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_a_pipe_or_a_device_instead_of_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "tokens").mkdir()
    os.mkfifo(tmp_path / "tokens" / TOKENS_FILE)
    os.mkfifo(tmp_path / "text")
    for path in (tmp_path / "tokens", tmp_path / "text", "/dev/zero"):
        message = refusal(partial(load_dataset, DataConfig(path=str(path)), 4), path)
        assert "cannot read" in message and str(path) in message
