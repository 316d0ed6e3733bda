"""Chapter 12, copying, suppression, and tests of a circuit."""

import torch

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import expect, expect_close, expect_equal, expect_shape, random
from course.engine.page import stated

IMPORTS = ["import itertools", "import torch"]


# full_ov_table


def a_row_is_what_is_said_of_a_token(full_ov_table):
    """row t is W_E[t], through OV, and unembedded"""
    W_E, W_OV, W_U = random(5, 4), random(4, 4, seed=1), random(4, 5, seed=2)
    table = full_ov_table(W_E, W_OV, W_U)
    expect_close(table[3], (W_E[3] @ W_OV) @ W_U, "row 3", "token_said", ask="the token seen is "
                                                                             "the row, the token "
                                                                             "predicted the column")
    expect_shape(table, (5, 5), "the table")


def a_head_that_copies_has_its_diagonal(full_ov_table):
    """with tokens at right angles and OV the identity, the table is the identity"""
    expect_close(full_ov_table(torch.eye(4), torch.eye(4), torch.eye(4)), torch.eye(4), "the table",
                 "token_seen token_said")
    wide = full_ov_table(random(7, 3), random(3, 3), random(3, 7))
    expect_shape(wide, (7, 7), "the table for 7 tokens")


# own_rank


def who_suppresses_itself_has_rank_zero(own_rank):
    """a negative diagonal gives 0 everywhere, a positive one the last rank"""
    expect_close(own_rank(-torch.eye(4)), torch.zeros(4), "the rank", "token")
    expect_close(own_rank(torch.eye(4)), torch.full((4,), 3), "the rank if each token raises "
                                                              "itself",
                 "token")


def ranks_are_of_rows(own_rank):
    """the rank of each token's own logit in its row"""
    table = torch.tensor([[2.0, 1, 3], [0, 5, 9], [7, 8, 6]])
    expect_close(own_rank(table), torch.tensor([1, 1, 0]), "the rank", "token",
                 ask="how many in the same row are lower")


# project_out


def nothing_is_left_along_it(project_out):
    """the product with the direction is 0, for any length of it"""
    resid, direction = random(2, 3, 6), 5 * random(6, seed=1)
    expect_close(project_out(resid, direction) @ direction, torch.zeros(2, 3),
                 "the rest along the direction", "batch pos", tolerance=1e-3)


def the_rest_is_left(project_out):
    """of (3, 4) without (0, 2), (3, 0) is left"""
    got = project_out(torch.tensor([[3.0, 4]]), torch.tensor([0.0, 2]))
    expect_close(got, torch.tensor([[3.0, 0]]), "what is left", "pos d_model")


# minimal_circuits


def sets_of(circuits):
    return sorted(sorted(circuit) for circuit in circuits)


def an_and_has_one(minimal_circuits):
    """a and b needed: {a, b}, and not {a, b, c}"""
    got = minimal_circuits(["a", "b", "c"], lambda circuit: {"a", "b"} <= set(circuit))
    expect_equal(sets_of(got), [["a", "b"]], "the minimal circuits")


def an_or_has_two(minimal_circuits):
    """a or b is enough: {a} and {b}: there is more than one answer"""
    got = minimal_circuits(["a", "b", "c"], lambda circuit: "a" in circuit or "b" in circuit)
    expect_equal(sets_of(got), [["a"], ["b"]], "the minimal circuits")


def what_works_against_others_counts(minimal_circuits):
    """b and c each break a, and together cancel: {a, b, c} works, but is not minimal"""
    def works(circuit):
        return "a" in circuit and ("b" in circuit) == ("c" in circuit)

    expect_equal(sets_of(minimal_circuits(["a", "b", "c"], works)), [["a"]],
                 "the minimal circuits", ask="none of its proper subsets may work, not only those "
                 "that lack one part")


def nothing_may_be_enough(minimal_circuits):
    """if nothing is needed, the empty circuit is the only one"""
    expect_equal(sets_of(minimal_circuits(["a"], lambda circuit: True)), [[]],
                 "the minimal circuits")


# draw_circuit


def n_edges_once_each(draw_circuit):
    """n different edges, in their order"""
    edges = [f"e{i}" for i in range(10)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        chosen = draw_circuit(edges, 4, generator)
        expect(len(set(chosen)) == len(chosen) == 4, f"{chosen} are not 4 different edges")
        expect(chosen == sorted(chosen), f"{chosen} are not in their order")


def every_edge_comes_up(draw_circuit):
    """over many draws, all edges are equally frequent"""
    generator = torch.Generator().manual_seed(0)
    counts = [0] * 6
    for _ in range(300):
        for edge in draw_circuit(list(range(6)), 2, generator):
            counts[edge] += 1
    expect(min(counts) > 60 and max(counts) < 140, f"in 300 draws of 2 of 6 edges they came up "
           f"{counts} times; each should about 100 times")


# distance_over_sizes


def a_perfect_curve_has_none(distance_over_sizes):
    """where every size has faithfulness 1, the distance is 0"""
    expect_close(distance_over_sizes(torch.tensor([0.0, 0.5, 1]), torch.ones(3)), 0.0,
                 "the distance")


def a_straight_rise_has_a_half(distance_over_sizes):
    """a straight rise from 0 to 1 has 1/2, whatever the pieces"""
    shares = torch.tensor([0.0, 0.1, 0.4, 1])
    expect_close(distance_over_sizes(shares, shares), 0.5, "the distance", ask="pieces count by "
                 "their widths")


def above_one_is_not_better(distance_over_sizes):
    """faithfulness of 1.5 is as far off as 0.5"""
    shares = torch.tensor([0.0, 1])
    expect_close(distance_over_sizes(shares, torch.tensor([1.5, 1.5])), 0.5, "the distance",
                 ask="|1 - faithfulness|")


EXERCISES = [
    Exercise(
        name="full_ov_table", source=None, minutes=5, difficulty=1, needed_for="own_rank",
        task="Compute the logits that a head writes for each token seen.",
        checks=(a_head_that_copies_has_its_diagonal, a_row_is_what_is_said_of_a_token),
        hints=("A token's row of W_E goes through OV.", "Then W_U makes logits.",
               "W_E @ W_OV @ W_U."),
        mistakes=(
            Mistake("when OV is transposed", "W_E @ W_OV @ W_U", "W_E @ W_OV.T @ W_U"),
            Mistake("when the table is transposed", "W_E @ W_OV @ W_U", "(W_E @ W_OV @ W_U).T"),
        )),
    Exercise(
        name="own_rank", source=None, minutes=10, difficulty=1,
        needed_for="finding heads that suppress", task="Find the rank of the diagonal in each row.",
        checks=(who_suppresses_itself_has_rank_zero, ranks_are_of_rows),
        hints=("table.diagonal() is each token's own logit.", "Compare a row with it.",
               "(table < table.diagonal()[:, None]).sum(1)."),
        mistakes=(
            Mistake("in its column instead of its row", "table.diagonal()[:, None]",
                    "table.diagonal()", also=((".sum(1)", ".sum(0)"),)),
            Mistake("counted from the top", "table < own", "table > own"),
            Mistake("when it counts itself", "table < own", "table <= own"),
        )),
    Exercise(
        name="project_out", source=None, minutes=10, difficulty=1,
        needed_for="asking what attention reads", task="The direction may have any length.",
        checks=(nothing_is_left_along_it, the_rest_is_left),
        hints=("Make the direction a unit vector first.", "The part along it: (resid @ unit) unit.",
               "resid - (resid @ unit)[..., None] * unit."),
        mistakes=(
            Mistake("when the direction is not of length 1", "direction / direction.norm()",
                    "direction"),
            Mistake("when the part along it is kept instead of the rest", "return resid - (",
                    "return ("),
            Mistake("when the direction itself is subtracted", "(resid @ unit)[..., None] * unit",
                    "direction"),
        )),
    Exercise(
        name="minimal_circuits", source=None, minutes=20, difficulty=3,
        needed_for="asking whether it is the only one", task="All subsets, if there are few parts.",
        checks=(an_and_has_one, an_or_has_two, nothing_may_be_enough,
                what_works_against_others_counts),
        hints=("itertools.combinations(parts, size), for every size from 0.",
               "A circuit is minimal if it works and none of its proper subsets does.",
               "Go up in size: a set that contains a circuit found before is not minimal."),
        mistakes=(
            Mistake("when all circuits that work are listed",
                    " and not any(works(set(smaller)) for n in range(size)\n"
                    "                                          for smaller in "
                    "itertools.combinations(chosen, n))", ""),
            Mistake("when only the smallest size is listed, and the first of it",
                    "                found.append(circuit)\n",
                    "                found.append(circuit)\n                return found\n"),
            Mistake("when only subsets that lack one part are tried", "for n in range(size)\n",
                    "for n in [size - 1] if size\n"),
            Mistake("when the empty circuit is not tried", "range(len(parts) + 1)",
                    "range(1, len(parts) + 1)"),
        )),
    Exercise(
        name="draw_circuit", source=None, minutes=5, difficulty=1,
        needed_for="comparing a circuit with 100 random ones", task="A null.",
        checks=(n_edges_once_each, every_edge_comes_up),
        hints=("torch.randperm gives a random order of all.", "The first n of it, sorted.",
               "[edges[i] for i in …tolist()]."),
        mistakes=(
            Mistake("with repetition", "torch.randperm(len(edges), generator=generator)[:n]",
                    "torch.randint(len(edges), (n,), generator=generator)"),
            Mistake("when the first n are always taken",
                    "torch.randperm(len(edges), generator=generator)[:n]", "torch.arange(n)"),
            Mistake("in the order of drawing", ".sort().values", ""),
        )),
    Exercise(
        name="distance_over_sizes", source=None, minutes=10, difficulty=1,
        needed_for="comparing ways to find circuits", task="An area.",
        checks=(a_perfect_curve_has_none, a_straight_rise_has_a_half, above_one_is_not_better),
        hints=("The gap to 1, without its sign.", "A trapezoid: mean of both ends times the width.",
               "((gaps[1:] + gaps[:-1]) / 2 * widths).sum()."),
        mistakes=(
            Mistake("when above 1 counts as better", "(1 - faithfulness).abs()",
                    "(1 - faithfulness)"),
            Mistake("with the mean over points, whatever the widths",
                    "((gaps[1:] + gaps[:-1]) / 2 * widths).sum()", "gaps.mean()"),
            Mistake("with the left end of each piece", "(gaps[1:] + gaps[:-1]) / 2", "gaps[:-1]"),
            Mistake("of the area below the curve", "(1 - faithfulness).abs()", "faithfulness"),
        )),
]

PREDICTIONS = [
    Prediction("In the trained model, how many even shares of the head's attention does a seen "
               "token get that is predicted right now?",
               stated(12, "never back: … above the floor; predicted keys get {} even shares"),
               "the chapter's block"),
    Prediction("Add a token's unembedding to what the heads' queries read, half as long as the "
               "stream. How much of their attention moves to that token?",
               stated(12, "Add an unembedding to the queries alone: {} of the team's attention"),
               "The experiment"),
    Prediction("And how much for a random direction of the same length?",
               stated(12, "For a random direction of that length it is {}."), "The experiment"),
    Prediction("One head has 32 dimensions. Look at what it writes because a token was seen. For "
               "what percentage of the 32 tokens is that token itself lowered most?",
               stated(12, "One head alone does it for {} % of the tokens"), "The experiment"),
]
