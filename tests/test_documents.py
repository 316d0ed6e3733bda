"""Documents from files, folders, JSON lines and gzip: the same text however it is stored."""

import gzip
import itertools
import json
import os
import tracemalloc
from functools import partial

import pytest
from helpers import refusal

import documents
from documents import START, document_pieces, find_files
from utils import read_text, text_pieces

MARK = b"\xef\xbb\xbf"
SIZES = (1, 2, 3, 4, 7, 64)
TEXTS = ["ab\ncd", "", "é 日本\r\n🙂", "\ufeff", "x" * 20, "\n"]


def put(path, content):
    """The path of a file with this content, bytes or a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def json_lines(texts, field="text"):
    """Texts as JSON lines, every second one with its characters escaped."""
    lines = [json.dumps({"id": number, field: text}, ensure_ascii=number % 2 == 0)
             for number, text in enumerate(texts)]
    return "\n".join(lines)


def joined(files, size=1 << 18, **how):
    return "".join(text for text, _ in document_pieces(files, size=size, **how))


def every_kind_of_file(folder):
    """Files of all kinds, some without text, and the documents in them."""
    files = [
        put(folder / "a.txt", TEXTS[0]),
        put(folder / "b.jsonl", json_lines(TEXTS) + "\n\n  \n"),
        put(folder / "c.txt", b""),
        put(folder / "d.md.gz", gzip.compress(MARK + TEXTS[2].encode())),
        put(folder / "e.jsonl.gz", gzip.compress(MARK + json_lines(TEXTS[::-1]).encode())),
        put(folder / "f", MARK),
    ]
    found = [TEXTS[0], *TEXTS, TEXTS[2], *TEXTS[::-1]]
    return files, [text for text in found if text]


# The text


def test_documents_are_joined_whatever_their_files_and_their_pieces(tmp_path):
    files, texts = every_kind_of_file(tmp_path)
    for size, between in itertools.product(SIZES, ("", "\n\n", "<|endoftext|>")):
        found = joined(files, size, between=between)
        assert found == between.join(texts), f"pieces of {size} with {between!r} between"


def test_pieces_have_the_size_asked_for(tmp_path):
    files, _ = every_kind_of_file(tmp_path)
    for size in SIZES:
        lengths = [len(text) for text, _ in document_pieces(files, size=size)]
        assert 2 * min(lengths[:-1]) >= size and max(lengths) <= 1.5 * size, size


def test_reading_goes_on_from_every_place_between_two_pieces(tmp_path):
    files, texts = every_kind_of_file(tmp_path)
    for size in SIZES:
        pieces = list(document_pieces(files, size=size, between="|"))
        for number, (_, place) in enumerate(pieces):
            before = "".join(text for text, _ in pieces[: number + 1])
            rest = joined(files, size, between="|", place=place)
            assert before + rest == "|".join(texts), f"{place} of pieces of {size}"


def test_a_place_says_how_much_of_the_files_has_been_read(tmp_path):
    files, _ = every_kind_of_file(tmp_path)
    places = [place for _, place in document_pieces(files, size=1)]
    read = [place.n_bytes for place in places]
    assert read == sorted(read) and 0 < read[0] < read[-1] <= sum(map(os.path.getsize, files))
    for number, place in enumerate(places):
        later = [place.n_bytes for _, place in document_pieces(files, size=1, place=place)]
        assert later == read[number + 1 :]


def test_another_field_may_hold_the_text(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"text": "no", "story": "yes"}\r\n{"story": "so"}')
    assert joined([path], field="story") == "yesso"


# Files of UTF-8


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    contents = [MARK + b"ab", b"", MARK, MARK + MARK, "é\ufeff".encode()]
    paths = [put(tmp_path / f"{i}.txt", content) for i, content in enumerate(contents)]
    for size in SIZES:
        assert joined(paths, size) == "ab\ufeffé\ufeff", f"{size} bytes at a time"
        assert "".join(text_pieces(paths[0], size)) == "ab"
    assert read_text(paths[0]) == "ab"
    assert "is empty" in refusal(lambda: read_text(paths[2]))
    for content, place in [(MARK + b"ab\xff", "byte 5 is 0xff"), (MARK[:2], "byte 0 is 0xef")]:
        put(tmp_path / "0.txt", content)
        for size in (1, 2, 64):
            assert place in refusal(partial(joined, paths, size), content)


def test_bytes_that_are_not_utf_8_are_named_with_their_place_in_the_file(tmp_path):
    fine = put(tmp_path / "fine.txt", "é fine")
    line = b'{"text": "\xc3\xa9"}\n'  # 15 bytes
    for content, place in [
        (b"ab\xff", "byte 2 is 0xff"), ("aé".encode() + b"\xc3", "byte 3 is 0xc3"),
        ("é".encode() + b"\xe9 ", "byte 2 is 0xe9"),
        ("日本".encode()[:-1] + b" ", "byte 3 is 0xe6"),
    ]:
        bad = put(tmp_path / "bad.txt", content)
        packed = put(tmp_path / "bad.txt.gz", gzip.compress(content))
        for path, size in itertools.product((bad, packed), (1, 2, 64)):
            message = refusal(partial(joined, [fine, path], size), content)
            assert path in message and place in message, f"{size} bytes at a time"
            assert ("unpacked" in message) == (path == packed)

    for before, place in ((b"", 25), (MARK, 28)):
        bad = put(tmp_path / "bad.jsonl", before + line + b'{"text": "\xff"}')
        message = refusal(partial(joined, [fine, bad]))
        assert bad in message and f"byte {place} is 0xff" in message


# What is refused


def test_a_broken_line_is_refused_with_its_file_and_its_number(tmp_path):
    for line, told in {
        '{"text": "a"': "is not JSON",
        "{'text': 'a'}": "is not JSON",
        '{"text": "a"} {"text": "b"}': "is not JSON",
        "[" * 100_000: "is not JSON",
        '["text"]': "is not a JSON object",
        '"text"': "is not a JSON object",
        '{"title": "a", "body": "b"}': "has no field 'text', only title, body; choose one with",
        '{"text": null}': "has null in 'text'",
        '{"text": ["a"]}': "has [\"a\"] in 'text'",
        '{"text": "a\\ud800"}': "half a surrogate pair",
    }.items():
        path = put(tmp_path / "a.jsonl", '{"text": "a"}\n\n' + line + '\n{"text": "b"}')
        message = refusal(partial(joined, [path]), line)
        assert f"{path}, line 3," in message and told in message, line


def test_a_line_too_long_for_memory_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 20)
    path = put(tmp_path / "a.jsonl", json_lines(["a"]) + "\n" + json_lines(["a" * 50]))
    assert "line 1" in refusal(partial(joined, [path]))
    assert joined([put(tmp_path / "a.jsonl", '{"text": "12345678"}')]) == "12345678"


def test_gzip_that_is_cut_off_or_damaged_or_none_is_refused(tmp_path):
    whole = gzip.compress(os.urandom(3000).hex().encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (whole[:-9], whole[:-1], whole[:5], bytes(damaged), b"plain text",
                    whole + b"more"):
        path = put(tmp_path / "a.txt.gz", content)
        message = refusal(partial(joined, [path], 64), content[-9:])
        assert f"{path} is cut off or not gzip" in message
    twice = gzip.compress(b"ab") + gzip.compress(b"cd")
    assert joined([put(tmp_path / "a.txt.gz", twice)]) == "abcd"


def test_gzip_that_unpacks_to_very_much_takes_little_memory(tmp_path):
    path = put(tmp_path / "a.txt.gz", gzip.compress(b"ab" * (1 << 24), 1))
    assert os.path.getsize(path) < 1 << 18
    tracemalloc.start()
    try:
        n_characters = sum(len(text) for text, _ in document_pieces([path]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_characters == 1 << 25 and peak < 1 << 22, f"{peak:,} bytes for {n_characters:,}"


# Folders


def test_a_folder_gives_its_texts_sorted_by_path_without_hidden_ones(tmp_path):
    wanted = ["a/2.md", "a/b/1.txt", "a-b/1.jsonl", "a.txt", "b.TXT.gz", "c.jsonl.gz"]
    others = [".hidden.txt", ".git/a.txt", "a/.b/c.txt", "a.py", "b.bin.gz", "txt", "a.txt.zip"]
    for name in [*reversed(wanted), *others]:
        put(tmp_path / name, "x")
    found = [os.path.relpath(path, tmp_path) for path in find_files([tmp_path])]
    assert found == wanted
    single = put(tmp_path / "a.py", "x")
    assert find_files([single, tmp_path / "a", single]) == [
        single, str(tmp_path / "a/2.md"), str(tmp_path / "a/b/1.txt"), single]


def test_links_that_lead_in_a_circle_are_not_followed(tmp_path):
    path = put(tmp_path / "a" / "1.txt", "x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "2.txt").symlink_to(path)
    assert find_files([tmp_path]) == [path, str(tmp_path / "a" / "2.txt")]
    (tmp_path / "a" / "3.txt").symlink_to(tmp_path / "nothing")
    assert "3.txt: No such file" in refusal(lambda: find_files([tmp_path]))
    (tmp_path / "b.txt").symlink_to("b.txt")
    assert "b.txt" in refusal(lambda: find_files([tmp_path / "b.txt"]))


def test_a_folder_without_texts_is_refused(tmp_path):
    put(tmp_path / "a.py", "x")
    message = refusal(lambda: find_files([tmp_path]))
    assert str(tmp_path) in message and ".jsonl" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_folder_that_cannot_be_read_is_not_left_out_silently(tmp_path):
    put(tmp_path / "a.txt", "x")
    put(tmp_path / "b" / "c.txt", "x")
    (tmp_path / "b").chmod(0)
    try:
        assert "Permission denied" in refusal(lambda: find_files([tmp_path]))
    finally:
        (tmp_path / "b").chmod(0o700)


def test_a_file_that_is_empty_has_no_pieces(tmp_path):
    files = [put(tmp_path / name, "") for name in ("a.txt", "b.jsonl")]
    assert list(document_pieces(files)) == [] and list(document_pieces([])) == []
    assert START == documents.Place()
