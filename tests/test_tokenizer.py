"""Characters to ids and back."""

import contextlib
import itertools
import json
import random
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import refusal
from test_train import argv, final, interrupt, named, on_batch, quietly, run_of, same

import corpus
import tokenizer as tokenizer_module
import train
from checkpoint import load_checkpoint, load_model
from tokenizer import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer, split_words

GPT2_FILES = Path(__file__).resolve().parent.parent / "data/gpt2_bpe"
needs_gpt2_files = pytest.mark.skipif(not (GPT2_FILES / "encoder.json").exists(),
                                      reason="data/gpt2_bpe has no files")
TEXT = "Zoë läuft, läuft…\n\t'😀' 42"


def test_decoding_undoes_encoding_for_any_text_of_the_alphabet():
    tokenizer = CharTokenizer().fit(TEXT)
    draw = random.Random(0)
    for _ in range(5):
        text = "".join(draw.choices(sorted(set(TEXT)), k=50))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_undoes_decoding_for_any_ids():
    tokenizer = CharTokenizer().fit(TEXT)
    ids = list(range(tokenizer.d_vocab))[::-1] * 2
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_the_empty_text_has_no_ids():
    tokenizer = CharTokenizer().fit(TEXT)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_ids_follow_the_order_of_code_points_and_use_each_number_once():
    assert CharTokenizer().fit("banana\n").encode("\nabn") == [0, 1, 2, 3]
    assert CharTokenizer().fit("banana\n").d_vocab == 4


def test_the_vocabulary_depends_on_the_characters_alone():
    shuffled = "".join(random.Random(0).sample(TEXT, len(TEXT)))
    assert CharTokenizer().fit(shuffled * 2).state_dict() == CharTokenizer().fit(TEXT).state_dict()


def test_fitting_again_forgets_the_first_text():
    tokenizer = CharTokenizer().fit("xyz").fit("ab")
    assert tokenizer.encode("ab") == [0, 1]
    assert "'x'" in refusal(lambda: tokenizer.encode("x"))


def test_unknown_characters_are_named_and_known_ones_are_not():
    message = refusal(lambda: CharTokenizer().fit("ab").encode("aéqb"))
    assert "'q' 'é'" in message and "2: 'ab'" in message and "'a'" not in message


def test_the_words_that_a_tokenizer_knows_are_listed_apart():
    message = refusal(lambda: WordTokenizer().fit("Ada naps").encode("Ben naps"))
    assert "'Ben'" in message and "2: 'Ada naps'" in message


def test_unknown_ids_are_named_and_negative_ones_do_not_count_from_the_end():
    tokenizer = CharTokenizer().fit("abc")
    for unknown in (3, 99, -1):
        message = refusal(partial(tokenizer.decode, [0, unknown, 2]), unknown)
        assert f"[{unknown}]" in message and "0 to 2" in message


def test_a_value_that_is_not_an_integer_is_refused_as_an_id(bpe):
    for tokenizer in (CharTokenizer().fit("abc"), bpe):
        for ids in ([1.9], torch.tensor([0.5]), ["a"], [None], [[1, 2]], 3):
            for call in (tokenizer.decode, tokenizer.to_bytes, tokenizer.to_str_tokens,
                         partial(tokenizer.to_str_tokens, show_unknown=True)):
                assert "not ids" in refusal(lambda call=call, ids=ids: call(ids), ids)


def test_a_tensor_is_decoded_like_a_list():
    tokenizer = CharTokenizer().fit("abc")
    assert tokenizer.decode(torch.tensor([2, 0, 1])) == "cab" == tokenizer.decode([2, 0, 1])


def test_the_tokens_of_a_text_are_its_characters_or_its_words():
    text = "ada, ivo"
    assert CharTokenizer().fit(text).to_str_tokens(text) == list(text)
    assert WordTokenizer().fit(text).to_str_tokens(text) == ["ada", ",", "ivo"]


def test_a_fresh_tokenizer_becomes_the_one_whose_state_it_loads_even_through_json():
    old = CharTokenizer().fit(TEXT)
    new = CharTokenizer().load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert new.encode(TEXT) == old.encode(TEXT) and new.d_vocab == old.d_vocab
    assert new.decode(old.encode(TEXT)) == TEXT


def test_the_state_of_another_tokenizer_is_refused():
    for state in ({"kind": "bpe", "characters": "ab"}, {}):
        assert "'char'" in refusal(partial(CharTokenizer().load_state_dict, state), state)


def test_a_vocabulary_that_cannot_spell_every_text_is_refused_by_its_bytes():
    tokens = BPETokenizer().state_dict()["tokens"]  # of a text, one may have learned a few bytes
    state = {"kind": "bpe", "tokens": tokens[2:], "merges": []}
    message = refusal(lambda: load_tokenizer(state))
    assert "2 of the 256 bytes" in message and "b'!'" in message


# Byte-pair encoding: by hand

# low occurs 4 times, " low" 3 times, " lowe" twice; l-o and o-w tie, and l-o sorts first.
LOW = "low lower lowest low"
LOW_MERGES = [(b"l", b"o"), (b"lo", b"w"), (b" ", b"low"), (b" low", b"e")]
SPACE = 220  # the 33rd of the bytes that Latin-1 does not show, after the 188 that it does


def bpe_of(*merges, extra=()):
    """A tokenizer of the bytes, the merges, given as "left right", and some more tokens."""
    tokens = BPETokenizer().state_dict()["tokens"]
    made = [merge.replace(" ", "") for merge in merges]
    return load_tokenizer({"kind": "bpe", "tokens": [*tokens, *made, *extra],
                           "merges": [merge.split(" ") for merge in merges]})


def merges_of(tokenizer):
    return list(tokenizer.ranks)


def byte(character):
    """GPT-2's id of a visible ASCII character: "!" (33) is the first."""
    return ord(character) - 33


def test_merges_worked_by_hand_are_learned_until_no_pair_occurs_twice():
    tokenizer = BPETokenizer().train(LOW, 1000)
    assert merges_of(tokenizer) == LOW_MERGES and tokenizer.d_vocab == 260
    assert tokenizer.symbols[256:] == [b"lo", b"low", b" low", b" lowe"]


def test_text_is_encoded_as_by_hand():
    tokenizer = BPETokenizer().train(LOW, 260)
    for text, ids in [
        ("low", [257]), (" low", [258]), (" lower", [259, byte("r")]), ("lo lo", [256, SPACE, 256]),
        ("slow", [byte("s"), 257]), ("lolow", [256, 257]), ("  low", [SPACE, 258]), ("", []),
        ("we", [byte("w"), byte("e")]), ("ol\nlow", [byte("o"), byte("l"), 198, 257]),
    ]:
        assert tokenizer.encode(text) == ids, text


def test_pairs_are_merged_in_the_order_of_the_table():
    for merges, text, pieces in [
        # What was merged first, not what comes first
        (["b c", "a b", "ab c"], "abc", ["a", "bc"]),
        (["a b", "b c", "ab c"], "abcbc", ["abc", "bc"]),
        (["a b", "c d", "ab cd"], "abcdab", ["abcd", "ab"]),
        (["a a", "aa a"], "aaaaa", ["aa", "aaa"]),  # from the left
        (["b c", "a bc"], "ab", ["a", "b"]),  # a half of a merge is none
    ]:
        assert bpe_of(*merges).to_str_tokens(text) == pieces, merges


def test_the_bytes_have_gpt_2_s_ids():
    """The bytes that Latin-1 can show come first, in order; then the others, in order."""
    tokenizer = BPETokenizer()
    assert tokenizer.encode("!~ \n\0") == [0, 93, 220, 198, 188]
    assert tokenizer.encode("\x7f") == [221]  # after 33 controls and space: 188 + 33
    assert tokenizer.to_bytes([94, 255, 105, 106, 187]) == b"\xa1\xad\xac\xae\xff"
    assert sorted(tokenizer.to_bytes(range(256))) == list(range(256))


# Byte-pair encoding: against slow and simple ways


SPACE_CODES = [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000]
DIFFICULT = [
    " \n\t a'sdmtlrev", " \n\r\u3000\xa0\u2028\x1c\x1f\x85\u200b!x1", "'''st re ll d x",
    "aé\u0301ßж中ǅʰªº 1٣²½Ⅷ᠐", "🙂👩\u200d👩\ufe0f\U0001f3fd\U00020000\U0010ffff\u0378 a1\0",
    "".join(map(chr, SPACE_CODES)) + "a1!",
]


def kind_of(character):
    if ord(character) in SPACE_CODES:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def scanned(text):
    """GPT-2's words by a scanner: what the rule says, from left to right, without backtracking."""
    words = []
    start = 0
    while start < len(text):
        kinds = [kind_of(character) for character in text[start:]]
        ending = next((e for e in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
                       if text.startswith(e, start)), None)
        lead = text[start] == " " and kinds[1:2] not in ([], ["space"])
        length = lead + 1
        while length < len(kinds) and kinds[length] == kinds[lead]:
            length += 1
        if ending:
            length = len(ending)
        elif kinds[lead] == "space" and length < len(kinds) and length > 1:
            length -= 1  # the last blank goes to the word that follows
        words.append(text[start : start + length])
        start += length
    return words


def difficult_texts(n, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(pool, k=draw.randrange(14)))
            for pool in [*DIFFICULT, "".join(DIFFICULT)] for _ in range(n)]


def test_words_equal_those_of_a_scanner_written_by_hand():
    for text in difficult_texts(1000):
        words = split_words(text)
        assert words == scanned(text), repr(text)
        assert "".join(words) == text


def test_every_character_is_of_the_class_that_unicode_gives_it():
    """Between two letters a letter joins them, a number and a sign part them in their own ways."""
    shapes = {"letter": [3], "number": [1, 1, 1], "other": [1, 1, 1], "space": [1, 1, 1]}
    for code in [*range(0x3200), *range(0xF900, 0x11000, 7), *range(0x1F000, 0x1FB00, 5)]:
        if not 0xD800 <= code < 0xE000 and code != 0x20:  # a space goes with the word
            kind = kind_of(chr(code))
            text = f"x{chr(code)}x"
            assert [len(word) for word in split_words(text)] == shapes[kind], hex(code)
            twins = {"number": f"{chr(code)}1", "other": f"{chr(code)}!"}.get(kind, "a")
            assert split_words(twins) == [twins], hex(code)


def joined(pieces, pair):
    if len(pieces) < 2:
        return pieces
    if (pieces[0], pieces[1]) == pair:
        return [pieces[0] + pieces[1], *joined(pieces[2:], pair)]
    return [pieces[0], *joined(pieces[1:], pair)]


def naive_merges(text, n_merges):
    """Count all pairs of all words again before each merge."""
    words = [[word.encode()[i : i + 1] for i in range(len(word.encode()))]
             for word in scanned(text)]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [joined(word, best) for word in words]
    return merges


def naive_ids(tokenizer, merges, text):
    """Goes through the whole table in its order, for each word."""
    ids = []
    for word in scanned(text):
        pieces = [bytes([value]) for value in word.encode()]
        for pair in merges:
            pieces = joined(pieces, pair)
        ids += [tokenizer.symbols.index(piece) for piece in pieces]
    return ids


def merged_naively(tokenizer, word):
    """Looks through all pairs of the word before each merge."""
    pieces = [bytes([value]) for value in word.encode()]
    while known := [pair for pair in itertools.pairwise(pieces) if pair in tokenizer.ranks]:
        pieces = joined(pieces, min(known, key=tokenizer.ranks.get))
    return pieces


def test_merging_equals_the_naive_way_for_merges_in_any_order():
    """In a table that nobody trained, a merge can make a pair that comes before it."""
    draw = random.Random(3)
    for _ in range(150):
        pieces = [b"a", b"b", b"c"]
        pairs = []
        for _ in range(12):
            pair = draw.choice(pieces), draw.choice(pieces)
            if pair not in pairs and len(pair[0] + pair[1]) < 9:
                pairs.append(pair)
                pieces.append(pair[0] + pair[1])
        draw.shuffle(pairs)
        tokenizer = BPETokenizer()
        tokenizer.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        for _ in range(20):
            word = "".join(draw.choices("abc", k=draw.randint(0, 20)))
            assert tokenizer.merge(word) == merged_naively(tokenizer, word), (pairs, word)


class CountedRanks(dict):
    """Ranks that count how often they are asked for."""

    n_asked = 0

    def get(self, *args):
        self.n_asked += 1
        return super().get(*args)

    def __contains__(self, pair):
        self.n_asked += 1
        return super().__contains__(pair)


def test_a_long_word_costs_as_much_a_letter_as_a_short_one():
    tokenizer = BPETokenizer().train(letters(0, "abcdefgh ", 4000), 500)
    tokenizer.ranks = CountedRanks(tokenizer.ranks)
    for n in (100, 20_000):
        tokenizer.ranks.n_asked = 0
        tokenizer.merge(letters(1, "abcdefgh", n))
        assert tokenizer.ranks.n_asked < 8 * n, f"{tokenizer.ranks.n_asked} for {n} letters"


def letters(seed, alphabet="aab ", n=300):
    return "".join(random.Random(seed).choices(alphabet, k=n))


def test_training_and_encoding_equal_the_naive_ways():
    for text in [
        "", "a", "ab", "abab", "aaa aaa", "a" * 64,
        *(letters(seed) for seed in range(6)), letters(6, "ab"), letters(7, "aaaaaab "),
        letters(8, "äöß 中国", 150), "".join(difficult_texts(6, seed=9)), corpus.text(1200),
    ]:
        tokenizer = BPETokenizer().train(text, 256 + 60)
        merges = naive_merges(text, 60)
        assert merges_of(tokenizer) == merges, text
        assert tokenizer.symbols[256:] == [left + right for left, right in merges], text
        other = text[::-1][:200] + text[:100]
        assert tokenizer.encode(other) == naive_ids(tokenizer, merges, other), text


def test_the_vocabulary_is_as_large_as_asked_for_while_pairs_occur_twice():
    for vocab_size in (256, 257, 259, 260, 261, 10**9):
        tokenizer = BPETokenizer().train(LOW, vocab_size)
        assert tokenizer.d_vocab == min(vocab_size, 260)
        assert merges_of(tokenizer) == LOW_MERGES[: vocab_size - 256]


def test_fewer_tokens_than_bytes_are_refused():
    for vocab_size in (255, 0, -1):
        message = refusal(partial(BPETokenizer().train, LOW, vocab_size), vocab_size)
        assert f"vocab_size={vocab_size} " in message


def test_training_again_forgets_the_first_text():
    tokenizer = BPETokenizer().train(LOW, 300)
    tokenizer.encode(LOW)
    tokenizer.train("xyxyxy", 257)
    assert tokenizer.encode("low xy") == [*map(byte, "low"), SPACE, 256]


# Byte-pair encoding: there and back


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer().train(corpus.text(12_000) + "中国 🙂🙂 é\u0301é\u0301", 400)


def test_any_text_comes_back(bpe):
    draw = random.Random(0)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    anything = ["".join(map(chr, draw.choices(codes, k=20))) for _ in range(200)]
    fixed = ["\0", "\x1c \x1d", "\xa0", "\u3000 \u3000", "👩\u200d👩\u200d👧", "e\u0301", "\ufeff",
             "\r\n\r\n", "\uffff\ufffe", "<|endoftext|>"]
    for text in [*fixed, *anything, *difficult_texts(50, seed=1)]:
        assert bpe.decode(bpe.encode(text)) == text
        assert bpe.to_bytes(bpe.encode(text)) == text.encode()


def test_any_ids_decode_as_python_decodes_their_bytes(bpe):
    draw = random.Random(0)
    table = [bpe.to_bytes([i]) for i in range(bpe.d_vocab)]
    for _ in range(300):
        ids = draw.choices(range(bpe.d_vocab), k=8)
        expected = b"".join(table[i] for i in ids)
        assert bpe.decode(ids) == expected.decode(errors="replace")
        assert bpe.decode(torch.tensor(ids)) == bpe.decode(ids)


def test_bytes_that_are_no_text_become_replacement_characters():
    tokenizer = BPETokenizer()
    for text in (b"\xff", b"a\xc3", b"\xf0\x9f\x99", b"\xe2\x82!", b"\xed\xa0\x80",
                 b"\xc0\x80", b"\x80\x80"):
        ids = [tokenizer.symbols.index(bytes([value])) for value in text]
        shown = text.decode(errors="replace")
        assert tokenizer.decode(ids) == shown and "\ufffd" in shown
        assert tokenizer.to_bytes(ids) == text


def test_half_a_surrogate_pair_is_refused_by_its_place(bpe):
    acts = (bpe.encode, bpe.to_str_tokens, lambda text: BPETokenizer().train(text, 300))
    for text, place in (("\ud800", 0), ("ab\udfff", 2), ("é\ud83d\ude42", 1)):
        for act in acts:
            message = refusal(partial(act, text), repr(text))
            assert f"character {place} is '\\ud" in message and "surrogate" in message


def test_tokens_as_text_put_together_are_the_text(bpe):
    text = corpus.text(200)
    assert "".join(bpe.to_str_tokens(text)) == text
    assert bpe.to_str_tokens(bpe.encode(text)) == bpe.to_str_tokens(text)
    assert bpe.to_str_tokens(torch.tensor(bpe.encode(text))) == bpe.to_str_tokens(text)
    assert BPETokenizer().train(LOW, 260).to_str_tokens(" lowé") == [" low", "\ufffd", "\ufffd"]


def test_bpe_names_unknown_ids(bpe):
    for unknown in (400, -1, 10**6):
        for act in (bpe.decode, bpe.to_bytes):
            message = refusal(partial(act, [0, unknown]), unknown)
            assert f"[{unknown}]" in message and "0 to 399" in message


def test_endoftext_is_one_token_only_when_asked_for():
    tokenizer = bpe_of("a b", extra=["<|endoftext|>"])
    end = 257
    text = "<|endoftext|>ab<|endoftext|><|endoftext|> ab"
    assert tokenizer.endoftext_id == end
    assert tokenizer.encode(text, endoftext=True) == [end, 256, end, end, SPACE, 256]
    plain = tokenizer.encode(text)
    assert end not in plain and len(plain) == 3 * 13 + 3
    assert tokenizer.decode(plain) == tokenizer.decode([end, 256, end, end, SPACE, 256]) == text
    assert tokenizer.encode("ab", endoftext=True) == [256]


def test_a_tokenizer_without_endoftext_says_so_and_reads_other_text(bpe):
    assert bpe.encode("ab", endoftext=True) == bpe.encode("ab")
    assert "<|endoftext|>" in refusal(lambda: bpe.endoftext_id)
    assert "<|endoftext|>" in refusal(lambda: bpe.encode("a<|endoftext|>", endoftext=True))


def test_a_document_has_endoftext_as_one_token_where_the_tokenizer_has_it(bpe):
    text = "ab<|endoftext|>ab"
    having = bpe_of("a b", extra=["<|endoftext|>"])
    assert having.encode_document(text) == [256, 257, 256]
    for lacking in (bpe, CharTokenizer().fit(text), WordTokenizer().fit(text)):
        assert lacking.encode_document(text) == lacking.encode(text), lacking.kind


def test_ids_that_the_tokenizer_lacks_are_shown_as_such_when_asked_for(bpe):
    for tokenizer in (bpe, CharTokenizer().fit("ab"), WordTokenizer().fit("a b")):
        n = tokenizer.d_vocab
        for ids in ([0, n, -1], torch.tensor([0, n, -1])):
            shown = tokenizer.to_str_tokens(ids, show_unknown=True)
            assert shown == [tokenizer.decode([0]), f"<id {n}>", "<id -1>"], tokenizer.kind
        assert str(n) in refusal(lambda tokenizer=tokenizer, n=n: tokenizer.to_str_tokens([0, n]))


def test_the_limit_on_known_words_changes_no_ids(bpe, monkeypatch):
    text = corpus.text(2000) + "".join(difficult_texts(20, seed=2))
    expected = bpe.encode(text)
    for most in (0, 1, 3):
        monkeypatch.setattr(tokenizer_module, "MOST_CACHED_WORDS", most)
        fresh = load_tokenizer(bpe.state_dict())
        assert fresh.encode(text) == fresh.encode(text) == expected
        assert len(fresh.known_words) <= max(most, 1)


def test_ids_that_a_caller_changes_stay_out_of_the_next_answer(bpe):
    expected = list(bpe.encode("the"))
    bpe.encode("the").append(-1)
    assert bpe.encode("the") == expected


# Byte-pair encoding: on disk


@pytest.mark.parametrize("through", ["json", "torch"])
def test_a_bpe_state_comes_back_from_disk(bpe, tmp_path, through):
    if through == "json":
        state = json.loads(json.dumps(bpe.state_dict()))
    else:
        torch.save(bpe.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = load_tokenizer(state)
    text = corpus.text(500) + "🙂\0"
    assert isinstance(again, BPETokenizer) and again.symbols == bpe.symbols
    assert merges_of(again) == merges_of(bpe) and again.encode(text) == bpe.encode(text)
    assert again.state_dict() == bpe.state_dict()


def test_a_state_gives_the_tokenizer_of_its_kind():
    for tokenizer in (CharTokenizer().fit("ab"), BPETokenizer().train("abab", 257)):
        again = load_tokenizer(tokenizer.state_dict())
        assert type(again) is type(tokenizer) and again.encode("ab") == tokenizer.encode("ab")
    for state in ({}, {"kind": "words"}, {"kind": None}):
        message = refusal(partial(load_tokenizer, state), state)
        assert f"tokenizer={state.get('kind')!r}" in message and "char, word, bpe" in message
    chars = CharTokenizer().fit("ab").state_dict()
    message = refusal(lambda: BPETokenizer().load_state_dict(chars))
    assert "'char'" in message and "'bpe'" in message


def test_a_state_that_is_not_whole_is_refused():
    for state in ({"kind": "char"}, {"kind": "bpe"}, {"kind": "bpe", "tokens": []}):
        refusal(partial(load_tokenizer, state), state)


def write_files(folder, merges="#version: 0.2\nl o\nlo w\nĠ low\nĠlow e\n"):
    """The two files of the tokenizer that LOW trains, with <|endoftext|> as the last token."""
    names = BPETokenizer().state_dict()["tokens"]
    names = [*names, "lo", "low", "Ġlow", "Ġlowe", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(dict(reversed(vocab.items()))))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def test_the_two_files_make_the_tokenizer_that_training_made(tmp_path):
    for merges in (
        "#version: 0.2\nl o\nlo w\nĠ low\nĠlow e\n", "l o\nlo w\nĠ low\nĠlow e",
        "#version: 0.2\r\nl o\r\nlo w\r\nĠ low\r\nĠlow e\r\n",
    ):
        tokenizer = BPETokenizer.from_files(*write_files(tmp_path, merges))
        assert merges_of(tokenizer) == LOW_MERGES and tokenizer.endoftext_id == 260, merges
        assert tokenizer.encode(LOW) == BPETokenizer().train(LOW, 300).encode(LOW), merges


@pytest.mark.parametrize("file", [0, 1])
def test_a_file_of_the_tokenizer_that_cannot_be_read_is_named(tmp_path, file):
    paths = write_files(tmp_path)
    path = paths[file]
    for case, spoil in [
        ("binary", lambda: path.write_bytes(b"\xff\xfe\x00")), ("missing", path.unlink),
        ("a folder", path.mkdir),
    ]:
        spoil()
        message = refusal(lambda: BPETokenizer.from_files(*paths), case)
        assert path.name in message and "\n" not in message, message


def test_a_byte_order_mark_is_no_part_of_the_two_files(tmp_path):
    files = write_files(tmp_path)
    plain = BPETokenizer.from_files(*files)
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert BPETokenizer.from_files(*files).state_dict() == plain.state_dict()


def test_the_two_files_swapped_are_refused(tmp_path):
    vocab, merges = write_files(tmp_path)
    assert str(vocab) in refusal(lambda: BPETokenizer.from_files(merges, vocab))


def test_a_file_that_is_not_a_vocabulary_is_refused(tmp_path):
    paths = write_files(tmp_path, merges="")
    for vocab, told in [
        ("", "vocab.json"), ("[]", "vocab.json"), ("[" * 100_000, "vocab.json"),
        ('{"a": 0', "vocab.json"), ('{"a": "0"}', "vocab.json"),
        ('{"a": null, "b": 1}', "vocab.json"), ('{"a": 1}', "not 0, 1, 2"),
        ('{"a": 0, "b": 0}', "not 0, 1, 2"), ("{}", r"b'\x00'"), ('{"a b": 0}', "'a b'"),
    ]:
        paths[0].write_text(vocab)
        message = refusal(lambda: BPETokenizer.from_files(*paths), vocab[:20])
        assert told in message and "\n" not in message, message


def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path):
    for merges, told in [
        ("l o w", "not a pair"), ("low", "not a pair"), ("l  o", "not a pair"),
        ("l o\n中 w", "'中'"), ("q x", "b'qx'"), ("w lo", "b'wlo'"),
    ]:
        paths = write_files(tmp_path, merges)
        assert told in refusal(partial(BPETokenizer.from_files, *paths), merges)


# GPT-2's own files


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.from_files(GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe")


@needs_gpt2_files
def test_the_ids_of_gpt_2_are_the_published_ones(gpt2):
    assert gpt2.d_vocab == 50257 and gpt2.endoftext_id == 50256
    assert gpt2.encode(" the") == [262] and gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode("<|endoftext|>", endoftext=True) == [50256]
    assert 50256 not in gpt2.encode("<|endoftext|>")


@needs_gpt2_files
def test_gpt_2_s_vocabulary_is_its_bytes_its_merges_and_the_end(gpt2):
    merged = [left + right for left, right in merges_of(gpt2)]
    assert gpt2.symbols == [*BPETokenizer().symbols, *merged, b"<|endoftext|>"]


@needs_gpt2_files
def test_gpt_2_s_tokenizer_gives_any_text_back_even_after_a_load(gpt2):
    for text in [*difficult_texts(20, seed=3), corpus.text(500)]:
        assert gpt2.decode(gpt2.encode(text)) == text
    again = load_tokenizer(json.loads(json.dumps(gpt2.state_dict())))
    assert again.encode(corpus.text(500)) == gpt2.encode(corpus.text(500))


@needs_gpt2_files
def test_gpt_2_s_files_swapped_are_refused_in_a_short_line():
    for files in (("vocab.bpe", "encoder.json"), ("encoder.json", "encoder.json"),
                  ("vocab.bpe", "vocab.bpe")):
        paths = [GPT2_FILES / file for file in files]
        message = refusal(partial(BPETokenizer.from_files, *paths), files)
        assert len(message) < 400 and "\n" not in message


# A run with byte-pair encoding


def test_a_run_with_bpe_resumes_as_if_it_had_not_stopped_and_loads(tmp_path, monkeypatch):
    quietly(monkeypatch)
    flags = ["--data.tokenizer", "bpe", "--data.vocab_size", "300"]
    train.main(argv(tmp_path, *named("whole", *flags)))
    with monkeypatch.context() as context:
        on_batch(context, 3, interrupt)
        with contextlib.suppress(SystemExit):
            train.main(argv(tmp_path, *named("parts", *flags)))
    assert load_checkpoint(run_of(tmp_path, "parts") / "checkpoint.pt")["step"] < 6
    train.main(argv(tmp_path, *named("parts"), "--resume"))
    assert same(final(tmp_path, "whole"), final(tmp_path, "parts"))
    model, tokenizer = load_model("parts", tmp_path / "outputs")
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.d_vocab == model.cfg.d_vocab == 300
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert merges_of(tokenizer) == naive_merges(text[: len(text) - len(text) // 10], 44)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_come_back_with_their_spaces_and_none_around_a_line_s_end_or_before_a_mark():
    text = "when ada, ivo and leo went.\nada sings\n\nri sa?"
    tokenizer = WordTokenizer().fit(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
