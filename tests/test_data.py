"""Texts found, fetched from a server on this machine, split, and cut into windows."""

import functools
import itertools
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import refusal
from test_download import GOOD, mirror, nobody

import corpus
import data
import download
from config import DataConfig
from data import (
    TOKENS_FILE,
    load_dataset,
    load_text,
    random_batch,
    repeated_batch,
    sha256_of,
    tiny_shakespeare,
    windows_in_order,
)
from tokenizer import BPETokenizer, CharTokenizer
from utils import NoNetwork, seeded_generator

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that has a text in place of Tiny Shakespeare."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "download_verified",
                        functools.partial(download.download_verified, pause=0))
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", sha256_of(GOOD))
    with mirror() as server:
        yield server


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


def test_a_text_read_whole_has_the_ids_of_its_documents(tmp_path):
    tokenizer = BPETokenizer().train("abab", 257, endoftext=True)
    cfg = file_config(tmp_path, b"ab<|endoftext|> ab\n" * 40)
    dataset = load_dataset(cfg, 4, tokenizer)
    for part in (dataset.train, dataset.val):
        assert 257 in part.tolist() and tokenizer.encode("<")[0] not in part.tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_a_pipe_or_a_device_instead_of_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "tokens").mkdir()
    os.mkfifo(tmp_path / "tokens" / TOKENS_FILE)
    os.mkfifo(tmp_path / "text")
    for path in (tmp_path / "tokens", tmp_path / "text", "/dev/zero"):
        message = refusal(partial(load_dataset, DataConfig(path=str(path)), 4), path)
        assert "cannot read" in message and str(path) in message
