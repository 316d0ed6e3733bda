"""Chapter 2, text with a known entropy: the least cost of a symbol, byte pairs, and windows."""

import math

import torch

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, expect_equal
from course.engine.page import stated
from tokenizer import BPETokenizer

IMPORTS = ["import itertools", "import math", "from collections import Counter", "import torch"]


# entropy_of


def eight_equal_words_cost_ln_eight(entropy_of):
    """eight equally likely syllables cost ln 8 = 2.08 nats"""
    expect_close(entropy_of(dict.fromkeys("abcdefgh", 1 / 8)), math.log(8), "the entropy",
                 ask="the sum of p times -ln p")


def the_certain_costs_nothing(entropy_of):
    """a certain option costs 0, also beside an impossible one"""
    expect_close(entropy_of({"a": 1.0, "b": 0.0}), 0.0, "the entropy", ask="0 log 0 is 0")


def uneven_words_cost_less(entropy_of):
    """chances of 1/2, 1/4, 1/4 cost 1.5 ln 2"""
    expect_close(entropy_of({"a": 0.5, "b": 0.25, "c": 0.25}), 1.5 * math.log(2), "the entropy",
                 ask="weight each surprise by its probability")


# entropy_rate


def independent_symbols_have_their_entropy(entropy_rate):
    """if all rows are the same, it is the entropy of a row"""
    rate = entropy_rate(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    expect_close(rate, math.log(2), "the rate", ask="the shares sum to 1, and the entropy is in "
                                                    "nats")


def a_cycle_costs_nothing(entropy_rate):
    """if each symbol is determined by the one before it, it is 0"""
    rate = entropy_rate(torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    expect_close(rate, 0.0, "the rate", ask="0 log 0 is 0")


def states_count_by_the_time_spent_there(entropy_rate):
    """a state where two thirds of the time is spent counts for two thirds"""
    # from 0 to 0 or 1 evenly, from 1 always to 0: shares of 2/3 and 1/3
    rate = entropy_rate(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    expect_close(rate, 2 / 3 * math.log(2), "the rate", ask="state 0 has ln 2, state 1 has 0, and "
                 "two thirds of the time are spent in state 0")


# character_costs

WORDS = {"lake": 0.5, "lamp": 0.25, "park": 0.25}


def a_character_costs_what_it_rules_out(character_costs):
    """of lake 1/2, lamp 1/4 and park 1/4, the l of lake costs ln 4/3"""
    costs = costs_of(character_costs, "lake")
    expect_close(costs[0], math.log(4 / 3), "the cost of l", ask="lake and lamp begin with it")
    costs = costs_of(character_costs, "park")
    expect_close(costs[0], math.log(4), "the cost of the p of park",
                 ask="only park begins with it; lamp has its p elsewhere")


def costs_of(character_costs, word):
    options = dict(WORDS)
    costs = character_costs(word, options)
    expect(options == WORDS, "the words that were passed in are changed after the call: make a new "
           "dict instead of deleting from options")
    if not isinstance(costs, list) or len(costs) != len(word):
        raise Wrong(f"a list of {len(word)} numbers should be returned, one for each character of "
                    f"{word!r}")
    return costs


def what_follows_for_certain_is_free(character_costs):
    """after la, the k of lake costs ln 3/2; after lak, the e costs nothing"""
    costs = costs_of(character_costs, "lake")
    expect_close(costs[1], 0.0, "the cost of the first a", ask="after l only lake and lamp remain")
    expect_close(costs[2], math.log(3 / 2), "the cost of k", ask="the remaining probabilities no "
                                                                 "longer sum to 1: divide by "
                                                                 "their sum")
    expect_close(costs[3], 0.0, "the cost of e")


def together_they_cost_what_the_word_costs(character_costs):
    """the costs of a word's characters sum to -log of its probability"""
    for word, p in WORDS.items():
        expect_close(sum(costs_of(character_costs, word)), -math.log(p), f"the sum for {word}")


# count_pairs

HUG = [([b"h", b"u", b"g"], 10), ([b"p", b"u", b"g"], 5), ([b"a", b"a", b"a"], 2)]


def a_word_counts_as_often_as_it_occurs(count_pairs):
    """hug 10 times and pug 5 times: u g occurs 15 times"""
    counts = count_pairs(HUG[:2])
    expect_equal(counts[b"u", b"g"], 15, "the count of (b'u', b'g')")
    expect_equal(counts[b"h", b"u"], 10, "the count of (b'h', b'u')")


def pairs_do_not_span_words(count_pairs):
    """the last piece of a word and the first of the next are not a pair"""
    counts = count_pairs(HUG[:2])
    expect_equal(dict(counts).get((b"g", b"p"), 0), 0, "the count of (b'g', b'p')",
                 ask="they belong to two words")


def each_neighbourhood_counts(count_pairs):
    """in a a a there are two pairs"""
    twice, counts = count_pairs(HUG[2:]), count_pairs([([b"a", b"b", b"c", b"d"], 1)])
    expect_equal(twice[b"a", b"a"], 4, "the count of (b'a', b'a') in two aaa")
    expect_equal(dict(counts), {(b"a", b"b"): 1, (b"b", b"c"): 1, (b"c", b"d"): 1},
                 "the dict of the counts of one abcd")


# merge_pair


def a_pair_becomes_one_piece(merge_pair):
    """h u g with (u, g) merged is h ug"""
    expect_equal(merge_pair([b"h", b"u", b"g"], (b"u", b"g")), [b"h", b"ug"], "the result")


def every_occurrence_is_merged(merge_pair):
    """all of them; the pieces between them stay"""
    expect_equal(merge_pair([b"a", b"b", b"c", b"a", b"b"], (b"a", b"b")), [b"ab", b"c", b"ab"],
                 "the result")


def only_the_pair_itself_is_merged(merge_pair):
    """not b a, not what only ends as the pair begins, not other pieces with the same letters"""
    expect_equal(merge_pair([b"b", b"a"], (b"a", b"b")), [b"b", b"a"], "b a with (a, b) merged",
                 ask="the order matters")
    expect_equal(merge_pair([b"ca", b"b"], (b"a", b"b")), [b"ca", b"b"], "ca b with (a, b) merged",
                 ask="ca is another piece than a")
    expect_equal(merge_pair([b"a", b"bc"], (b"ab", b"c")), [b"a", b"bc"],
                 "a bc with (ab, c) merged", ask="compare the pieces, not what they are together")


def from_the_left_and_none_twice(merge_pair):
    """a a a with (a, a) merged is aa a: a piece is used once"""
    expect_equal(merge_pair([b"a", b"a", b"a"], (b"a", b"a")), [b"aa", b"a"], "the result",
                 ask="go from the left; each piece is in one pair at most")


def the_old_list_is_left_alone(merge_pair):
    """the list that is passed in does not change"""
    pieces = [b"a", b"b"]
    merge_pair(pieces, (b"a", b"b"))
    expect_equal(pieces, [b"a", b"b"], "the list that was passed")


# learn_merges


def the_most_frequent_pair_comes_first(learn_merges):
    """of hug 10 times and pug 5 times, u g is merged first"""
    expect_equal(merges_of(learn_merges, {"hug": 10, "pug": 5}, 1), [(b"u", b"g")], "the list")


def merges_of(learn_merges, word_counts, n_merges):
    merges = learn_merges(word_counts, n_merges)
    if not isinstance(merges, list):
        return merges
    return [tuple(pair) if isinstance(pair, list) else pair for pair in merges]


def merged_pieces_can_be_merged_again(learn_merges):
    """then h and ug are merged"""
    expect_equal(merges_of(learn_merges, {"hug": 10, "pug": 5}, 2), [(b"u", b"g"), (b"h", b"ug")],
                 "the list", ask="the words must be merged before pairs are counted again")


def ties_are_broken_by_order(learn_merges):
    """of equally frequent pairs, the one that sorts first"""
    for merges in [merges_of(learn_merges, {"zy": 3, "ab": 3}, 1),
                   merges_of(learn_merges, {"ab": 3, "zy": 3}, 1)]:
        expect_equal(merges, [(b"a", b"b")], "the list",
                     ask="the result must not depend on the order of the words")


def letters_outside_of_ascii_are_two_bytes(learn_merges):
    """é is two bytes, c3 and a9, and they are merged like any pair"""
    expect_equal(merges_of(learn_merges, {"é": 3}, 1), [(b"\xc3", b"\xa9")], "the list",
                 ask="a word begins as its bytes in UTF-8")


def it_ends_where_no_pair_occurs_twice(learn_merges):
    """a pair that occurs only once is not merged, one that occurs twice is"""
    expect_equal(merges_of(learn_merges, {"ab": 2, "xyz": 1}, 9), [(b"a", b"b")], "the list")


# bpe_merge


def tokenizer_of(*merges):
    """A BPETokenizer that knows these merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    tokenizer = BPETokenizer()
    tokenizer.set_vocabulary_(tokens, list(merges))
    return tokenizer


def an_unknown_word_stays_bytes(bpe_merge):
    """a word without a known pair stays bytes: é is two of them"""
    pieces = bpe_merge(tokenizer_of(), "né")
    expect_equal(pieces, [b"n", b"\xc3", b"\xa9"], "né")


def the_pair_learned_first_is_merged_first(bpe_merge):
    """b c was learned before a b and c d: abc is a bc, and bcd is bc d; and wherever the pair
    stands in the word or in the alphabet, it is merged first"""
    tokenizer = tokenizer_of((b"b", b"c"), (b"a", b"b"), (b"c", b"d"))
    other = tokenizer_of((b"b", b"a"), (b"a", b"c"))  # its first pair sorts last
    found = (bpe_merge(tokenizer, "abc"), bpe_merge(tokenizer, "bcd"), bpe_merge(other, "bac"))
    wanted = ([b"a", b"bc"], [b"bc", b"d"], [b"ba", b"c"])
    for word, pieces, want in zip(("abc", "bcd", "bac"), found, wanted, strict=True):
        expect_equal(pieces, want, word,
                     ask="of the pairs that it has, is the one of lowest rank merged first?")


def it_goes_on_until_nothing_is_left(bpe_merge):
    """a merge can make another merge possible"""
    pieces = bpe_merge(tokenizer_of((b"u", b"g"), (b"h", b"ug")), "hughug")
    expect_equal(pieces, [b"hug", b"hug"], "hughug")


# random_batch


def targets_are_one_later(random_batch):
    """each target is the token after its input"""
    inputs, targets = random_batch(torch.arange(1000, 1500), 4, 6, torch.Generator().manual_seed(0))
    expect(inputs.shape == (4, 6) and targets.shape == (4, 6), f"inputs are {list(inputs.shape)} "
           f"and targets {list(targets.shape)}; both should be [batch 4, pos 6]")
    expect(inputs.min() >= 1000, "the text is 1000, 1001, …, 1499, and "
           f"{inputs.min()} is not in it: are these positions instead of the tokens there?")
    for of, target in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True):
        expect(target == of + 1, f"in the text 1000, 1001, …, 1499 the target of {of} is {target}, "
               f"and should be {of + 1}")
    expect(bool((inputs[:, 1:] == inputs[:, :-1] + 1).all()), "a window is not a piece of the text")


def every_window_can_be_drawn(random_batch):
    """the first and the last window are drawn too, and none whose last target is beyond the end"""
    inputs, _ = random_batch(torch.arange(8), 500, 5, torch.Generator().manual_seed(0))
    expect(len(inputs) == 500, f"of 500 windows {len(inputs)} came: a window may be drawn again")
    starts = sorted(set(inputs[:, 0].tolist()))
    expect(starts == [0, 1, 2], f"windows of 5 inputs in 8 tokens begin at {starts}; they should "
           "begin at 0, 1 and 2: the last target is the last token")


def the_generator_decides(random_batch):
    """the same generator gives the same batch, and torch's global one is not used"""
    tokens = torch.arange(1000)
    generator = torch.Generator().manual_seed(1)
    first = random_batch(tokens, 4, 6, generator)[0]
    second = random_batch(tokens, 4, 6, generator)[0]
    expect(not torch.equal(first, second), "two calls with one generator gave the same batch: draw "
           "from the generator that is passed, and don't seed it again")
    torch.manual_seed(99)
    again = random_batch(tokens, 4, 6, torch.Generator().manual_seed(1))[0]
    expect(torch.equal(first, again), "the same generator gave two different batches: is it used?")
    starts = first[:, 0].tolist()
    expect(len(set(starts)) > 1, "all windows of the batch begin at one place")


# window_bounds


def each_token_is_predicted_once(window_bounds):
    """tokens 1, 2, …, last are predicted once each, in order"""
    for last, n_ctx in ((10, 4), (8, 4), (3, 5)):
        predicted = [pos for begin, end in window_bounds(last, n_ctx)
                     for pos in range(begin + 1, end + 1)]
        expect(predicted == list(range(1, last + 1)), f"in a text whose last position is {last}, "
               f"windows of {n_ctx} predict positions {predicted}; each of 1 to {last} should be "
               "there once")


def no_window_is_longer_than_the_context(window_bounds):
    """a window reads at most n_ctx positions"""
    longest = max(end - begin for begin, end in window_bounds(10, 4))
    expect(longest <= 4, f"a window reads {longest} positions, and n_ctx is 4")


def no_window_is_empty(window_bounds):
    """every window predicts something"""
    for last in (8, 10):
        empty = [bounds for bounds in window_bounds(last, 4) if bounds[0] >= bounds[1]]
        expect(not empty, f"in a text whose last position is {last}, {empty} predicts nothing")


def windows_are_as_long_as_they_can_be(window_bounds):
    """every window but the last reads n_ctx positions"""
    bounds = list(window_bounds(10, 4))
    lengths = [end - begin for begin, end in bounds]
    expect(lengths == [4, 4, 2], "in a text whose last position is 10, windows of 4 read "
           f"{lengths} positions, and should read [4, 4, 2]")


EXERCISES = [
    Exercise(
        name="entropy_of", source=None, minutes=5, difficulty=1, needed_for="the floor",
        task="The least cost of a word, in nats.",
        checks=(eight_equal_words_cost_ln_eight, the_certain_costs_nothing,
                uneven_words_cost_less),
        hints=("The surprise of a word is -log p.", "It comes with probability p.",
               "-sum(p * math.log(p) for p in options.values() if p > 0)."),
        mistakes=(
            Mistake("in bits instead of nats", "math.log(p)", "math.log2(p)"),
            Mistake("without the minus", "return -sum", "return sum"),
            Mistake("when all surprises have the same weight", "p * math.log(p)",
                    "math.log(p) / len(options)"),
            Mistake("when the surprises are not weighted by their probabilities",
                    "p * math.log(p)", "math.log(p)"),
            Mistake("with the mean over words instead of the sum", "p * math.log(p)",
                    "p * math.log(p) / len(options)"),
        )),
    Exercise(
        name="entropy_rate", source=None, minutes=20, difficulty=2,
        needed_for="zero-layer models (chapter 3)",
        task="First the share of time spent in each state, then the entropy of what follows.",
        checks=(independent_symbols_have_their_entropy, a_cycle_costs_nothing,
                states_count_by_the_time_spent_there),
        hints=("If `shares` are the probabilities of the states, shares @ transitions are those "
               "one step later.",
               "Repeat it until it no longer changes; begin with even shares.",
               "Each row has an entropy, -sum p log p with 0 log 0 = 0; weight them by the "
               "shares."),
        mistakes=(
            Mistake("when all states count equally, or the matrix is used the wrong way round",
                    "shares @ transitions.double()", "transitions.double() @ shares"),
            Mistake("of the next symbol after one step from even shares", "range(10_000)",
                    "range(1)"),
            Mistake("of the shares alone, as if symbols were independent",
                    "(shares * entropies).sum()", "torch.special.entr(shares).sum()"),
            Mistake("in bits instead of nats", "(shares * entropies)",
                    "(shares * entropies / math.log(2))"),
            Mistake("with the sum over states, without the time spent there",
                    "(shares * entropies).sum()", "entropies.sum()"),
        )),
    Exercise(
        name="character_costs", source=None, minutes=20, difficulty=3,
        needed_for="the floor of character models (corpus.characters)",
        task="Divide a word's cost among its characters.",
        checks=(a_character_costs_what_it_rules_out, what_follows_for_certain_is_free,
                together_they_cost_what_the_word_costs),
        hints=("Before each character some words are still possible; after it, fewer.",
               "The character's probability is the remaining words' probability after it, divided "
               "by that before it.",
               "possible = {other: p … if other.startswith(word[:end])}; the cost is -log of the "
               "ratio of the sums."),
        mistakes=(
            Mistake("when words that are ruled out stay in the sum",
                    "before = sum(possible.values())", "before = sum(options.values())"),
            Mistake("when words are compared by this one character only",
                    "other.startswith(word[:end])", "other[end - 1 : end] == word[end - 1]",
                    also=(("for other, p in possible.items()",
                           "for other, p in options.items()"),)),
            Mistake("when words count that have these letters anywhere, not at their beginning",
                    "other.startswith(word[:end])", "word[:end] in other"),
            Mistake("without the minus", "-math.log(sum", "math.log(sum"),
            Mistake("in bits instead of nats", "math.log(sum", "math.log2(sum"),
            Mistake("when all remaining words count equally",
                    "sum(possible.values()) / before", "len(possible) / n_before",
                    also=(("before = sum(possible.values())", "n_before = len(possible)"),)),
        )),
    Exercise(
        name="count_pairs", source=None, minutes=10, difficulty=1, needed_for="learn_merges",
        task="Pairs within words, as often as the words occur.",
        checks=(a_word_counts_as_often_as_it_occurs, pairs_do_not_span_words,
                each_neighbourhood_counts),
        hints=("zip(pieces, pieces[1:]) gives the neighbours of a word.",
               "Add the word's count, not 1.", "A Counter starts at 0 for a new key."),
        mistakes=(
            Mistake("when every word counts once", "+= count", "+= 1"),
            Mistake("when pairs may span two words",
                    "    for pieces, count in words:\n        for left, right in "
                    "itertools.pairwise(pieces):\n            counts[left, right] += count\n",
                    "    row = [(piece, count) for pieces, count in words for piece in pieces]\n"
                    "    for (left, count), (right, _) in zip(row, row[1:], strict=False):\n"
                    "        counts[left, right] += count\n"),
            Mistake("without the last pair of a word", "itertools.pairwise(pieces)",
                    "itertools.pairwise(pieces[:-1])"),
            Mistake("when a pair counts once a word, however often it is there",
                    "itertools.pairwise(pieces)", "set(itertools.pairwise(pieces))"),
            Mistake("when the last word's count replaces those before", "+= count", "= count"),
            Mistake("with each piece in one pair only", "itertools.pairwise(pieces)",
                    "zip(pieces[::2], pieces[1::2], strict=False)"),
        )),
    Exercise(
        name="merge_pair", source="tokenizer.merge_pair", minutes=10, difficulty=1,
        needed_for="learn_merges, bpe_merge", task="From the left to the right, once.",
        checks=(a_pair_becomes_one_piece, every_occurrence_is_merged,
                only_the_pair_itself_is_merged, from_the_left_and_none_twice,
                the_old_list_is_left_alone),
        hints=("A while loop with an index: a pair moves it by two, anything else by one.",
               "Mind the last piece: it has no right neighbour.",
               "bytes are joined by +: pieces[i] + pieces[i + 1]."),
        mistakes=(
            Mistake("when a piece may be in two pairs", "            i += 2\n",
                    "            i += 1\n"),
            Mistake("when only the first occurrence is merged", "            i += 2\n",
                    "            i += 2\n            return merged + pieces[i:]\n"),
            Mistake("when the last piece is forgotten", "while i < len(pieces):",
                    "while i + 1 < len(pieces):"),
        )),
    Exercise(
        name="learn_merges", source="tokenizer.learn_merges", minutes=25, difficulty=2,
        needed_for="BPE's vocabulary",
        task="Count, merge the best pair, repeat. Call count_pairs and merge_pair; the check uses "
             "our versions of them. It may be slow.",
        checks=(the_most_frequent_pair_comes_first, merged_pieces_can_be_merged_again,
                ties_are_broken_by_order, letters_outside_of_ascii_are_two_bytes,
                it_ends_where_no_pair_occurs_twice),
        hints=("Begin with [bytes([byte]) for byte in word.encode()] for each word.",
               "Each round: counts = count_pairs(words); the best pair; words with it merged.",
               "min(counts, key=lambda pair: (-counts[pair], pair)) is the most frequent one, and "
               "the first of them."),
        mistakes=(
            Mistake("when a word begins as its letters, not as its bytes in UTF-8",
                    "word.encode()]", "word.encode('latin-1')]"),
            Mistake("when the words are not merged before the next count",
                    "        words = [(merge_pair(pieces, best), n) for pieces, n in words]\n",
                    "        words = [(pieces, n) for pieces, n in words\n"
                    "                 if merge_pair(pieces, best) == pieces]\n"),
            Mistake("when ties go to the pair that was seen first",
                    "min(counts, key=lambda pair: (-counts[pair], pair))",
                    "max(counts, key=counts.get)"),
            Mistake("when ties go to the pair that sorts last",
                    "min(counts, key=lambda pair: (-counts[pair], pair))",
                    "max(counts, key=lambda pair: (counts[pair], pair))"),
            Mistake("when a pair that occurs twice is not merged", "max(counts.values()) < 2",
                    "max(counts.values()) <= 2"),
            Mistake("when pairs that occur once are merged too", "max(counts.values()) < 2",
                    "max(counts.values()) < 1"),
            Mistake("when every word counts once, however often it occurs",
                    "for word, n in word_counts.items()]", "for word in word_counts]",
                    also=(("for byte in word.encode()], n)", "for byte in word.encode()], 1)"),)),
        )),
    Exercise(
        name="bpe_merge", source="tokenizer.BPETokenizer.merge", minutes=15, difficulty=2,
        needed_for="encoding text",
        task="Merge in the order of learning. Call merge_pair; the check uses our version of it.",
        checks=(an_unknown_word_stays_bytes, the_pair_learned_first_is_merged_first,
                it_goes_on_until_nothing_is_left),
        hints=("Of the pairs that the word has now, which was learned first?",
               "min over the pairs that are in self.ranks, by self.ranks.get.",
               "Loop: pairs = […]; if there are none, return; pieces = merge_pair(pieces, best)."),
        mistakes=(
            Mistake("when the leftmost known pair is merged first",
                    "min(pairs, key=self.ranks.get)", "pairs[0]"),
            Mistake("when the known pair that sorts first is merged first",
                    "min(pairs, key=self.ranks.get)", "min(pairs)"),
            Mistake("when the pair learned last is merged first",
                    "min(pairs, key=self.ranks.get)", "max(pairs, key=self.ranks.get)"),
            Mistake("after one merge only", "        pieces = merge_pair(",
                    "        return merge_pair("),
            Mistake("from characters instead of bytes", "bytes([byte]) for byte in word.encode()",
                    "character.encode() for character in word"),
        )),
    Exercise(
        name="random_batch", source="data.random_batch", minutes=10, difficulty=1,
        needed_for="training (chapter 6)", task="Windows from anywhere, with their targets.",
        checks=(targets_are_one_later, every_window_can_be_drawn, the_generator_decides),
        hints=("A window of n_ctx + 1 tokens holds inputs and targets.",
               "It may begin at 0, …, len(tokens) - n_ctx - 1; randint leaves its end out.",
               "tokens[starts[:, None] + torch.arange(n_ctx + 1)], then [:, :-1] and [:, 1:]."),
        mistakes=(
            Mistake("when targets are the inputs", "windows[:, 1:]", "windows[:, :-1]"),
            Mistake("when targets come one earlier", "return windows[:, :-1], windows[:, 1:]",
                    "return windows[:, 1:], windows[:, :-1]"),
            Mistake("when the last window can't be drawn", "len(tokens) - n_ctx,",
                    "len(tokens) - n_ctx - 1,"),
            Mistake("when the generator is not used", ", generator=generator)", ")"),
            Mistake("when a new generator is made in each call", "generator=generator",
                    "generator=torch.Generator().manual_seed(0)"),
            Mistake("when the first window can't be drawn", "torch.randint(len(tokens)",
                    "torch.randint(1, len(tokens)"),
            Mistake("with positions instead of the tokens there",
                    "tokens[starts + torch.arange(n_ctx + 1)]", "starts + torch.arange(n_ctx + 1)"),
            Mistake("when only every n_ctx-th window can be drawn",
                    "torch.randint(len(tokens) - n_ctx, (batch_size, 1), generator=generator)",
                    "n_ctx * torch.randint((len(tokens) - 1) // n_ctx, (batch_size, 1), "
                    "generator=generator)"),
            Mistake("when all rows begin at one place", "(batch_size, 1)", "(1, 1)",
                    also=(("    return windows",
                           "    windows = windows.expand(batch_size, -1)\n    return windows"),)),
        )),
    Exercise(
        name="window_bounds", source="data.window_bounds", minutes=10, difficulty=1,
        needed_for="the validation loss (chapter 6)",
        task="A whole text, each token predicted once; `starts` of the library is left out.",
        checks=(each_token_is_predicted_once, no_window_is_longer_than_the_context,
                no_window_is_empty, windows_are_as_long_as_they_can_be),
        hints=("The end of a window is the beginning of the next: it is predicted in the one and "
               "read in the other.",
               "begin = 0, n_ctx, 2 n_ctx, … below last.",
               "[(begin, min(begin + n_ctx, last)) for begin in range(0, last, n_ctx)]."),
        mistakes=(
            Mistake("when the last window reads beyond the text", "min(begin + n_ctx, last)",
                    "begin + n_ctx"),
            Mistake("when each window ends one too early", "min(begin + n_ctx, last)",
                    "min(begin + n_ctx - 1, last)"),
            Mistake("when the last token is not predicted", "min(begin + n_ctx, last)",
                    "min(begin + n_ctx, last - 1)"),
            Mistake("when the first window begins at 1", "range(0, last, n_ctx)",
                    "range(1, last, n_ctx)"),
            Mistake("with windows one shorter than n_ctx", "min(begin + n_ctx, last)",
                    "min(begin + n_ctx - 1, last)",
                    also=(("range(0, last, n_ctx)", "range(0, last, n_ctx - 1)"),)),
            Mistake("when an empty window follows the last one", "range(0, last, n_ctx)",
                    "range(0, last + 1, n_ctx)"),
            Mistake("when the rest at the end is dropped", "range(0, last, n_ctx)",
                    "range(0, last - n_ctx + 1, n_ctx)"),
            Mistake("when windows do not touch: one token between them is never predicted",
                    "range(0, last, n_ctx)", "range(0, last, n_ctx + 1)"),
            Mistake("when windows overlap by half", "range(0, last, n_ctx)",
                    "range(0, last, max(1, n_ctx // 2))"),
        )),
]

PREDICTIONS = [
    Prediction("A song starts with a syllable drawn from eight. How many nats does this syllable "
               "cost?",
               lambda: math.log(8), "ln 8",
               printed="cost $\\ln 8 = {}$ nats"),
    Prediction("How many does its repetition cost, after \"again\"?",
               stated(2, "again … syntax ri {} copying"), "the chapter's block"),
    Prediction("And a whole sentence, on average?",
               stated(2, "A sentence costs {} nats on average"), "Expected"),
]
