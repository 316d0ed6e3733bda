"""Characters to ids and back."""

import json
import random

import pytest
import torch

from tokenizer import CharTokenizer
from utils import UserError

TEXT = "Zoë läuft, läuft…\n\t'😀' 42"


@pytest.mark.parametrize("seed", range(5))
def test_decoding_undoes_encoding_for_any_text_of_the_alphabet(seed):
    tokenizer = CharTokenizer().fit(TEXT)
    text = "".join(random.Random(seed).choices(sorted(set(TEXT)), k=50))
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
    with pytest.raises(UserError):
        tokenizer.encode("x")


def test_unknown_characters_are_named_and_known_ones_are_not():
    with pytest.raises(UserError, match=r"unknown characters 'q' 'é'; .*knows 2: 'ab'"):
        CharTokenizer().fit("ab").encode("aéqb")


@pytest.mark.parametrize("unknown", [3, 99, -1])
def test_unknown_ids_are_named_and_negative_ones_do_not_count_from_the_end(unknown):
    with pytest.raises(UserError, match=rf"unknown ids \[{unknown}\]; they run from 0 to 2"):
        CharTokenizer().fit("abc").decode([0, unknown, 2])


def test_a_tensor_is_decoded_like_a_list():
    tokenizer = CharTokenizer().fit("abc")
    assert tokenizer.decode(torch.tensor([2, 0, 1])) == "cab" == tokenizer.decode([2, 0, 1])


def test_a_fresh_tokenizer_becomes_the_one_whose_state_it_loads_even_through_json():
    old = CharTokenizer().fit(TEXT)
    new = CharTokenizer().load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert new.encode(TEXT) == old.encode(TEXT) and new.d_vocab == old.d_vocab
    assert new.decode(old.encode(TEXT)) == TEXT


@pytest.mark.parametrize("state", [{"kind": "bpe", "characters": "ab"}, {}])
def test_the_state_of_another_tokenizer_is_refused(state):
    with pytest.raises(UserError, match="'char'"):
        CharTokenizer().load_state_dict(state)
