"""Chapter 8, read: an answer split among the parts that wrote it, and the logit lens."""

import math

import torch
import torch.nn.functional as F

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import expect, expect_close, random, random_ids
from course.engine.models import busy_model
from course.engine.page import stated

IMPORTS = ["import math", "import torch"]
TOKENS = random_ids(9, 2, 5)
CORRECT = torch.tensor([3, 7])
WRONG = torch.tensor([5, 0])


def run():
    """(model, logits, cache) of one run."""
    model = busy_model()
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    return model, logits, cache


# logit_difference


def it_reads_the_last_position(logit_difference):
    """the last position's logit of the one less that of the other"""
    logits = random(2, 3, 9)
    want = torch.stack([logits[0, 2, 3] - logits[0, 2, 5], logits[1, 2, 7] - logits[1, 2, 0]])
    expect_close(logit_difference(logits, CORRECT, WRONG), want, "the difference", "batch",
                 ask="each row has its own answers, at the last position")


def it_is_the_log_of_the_odds(logit_difference):
    """its exp is how many times likelier the answer is"""
    logits = random(2, 3, 9)
    p = logits[:, -1].softmax(-1)
    odds = p[[0, 1], CORRECT] / p[[0, 1], WRONG]
    expect_close(logit_difference(logits, CORRECT, WRONG).exp(), odds, "exp of the difference",
                 "batch")


# target_rank


def the_likeliest_has_rank_zero(target_rank):
    """the token with the highest logit has rank 0, the one with the lowest d_vocab - 1"""
    logits = torch.arange(5.0).expand(2, 3, 5)
    expect_close(target_rank(logits, torch.tensor([4, 0])), torch.tensor([0, 4]), "the rank",
                 "batch")


def it_counts_at_the_last_position(target_rank):
    """it counts the tokens above the target, at the last position"""
    logits = random(2, 3, 9)
    want = torch.tensor([int((row[-1] > row[-1, target]).sum())
                         for row, target in zip(logits, CORRECT, strict=True)])
    expect_close(target_rank(logits, CORRECT), want, "the rank", "batch")


# decompose_stream


def the_parts_sum_to_the_stream(decompose_stream):
    """the parts sum to the last stream"""
    model, _, cache = run()
    shape = list(getattr(decompose_stream(model, cache), "shape", []))
    expect(len(shape) == 4 and shape[1:] == [2, 5, 6], f"it is {shape}, and should be [component, "
           "batch 2, pos 5, d_model 6]: a new axis in front counts the parts")
    expect_close(decompose_stream(model, cache).sum(0), cache["resid_post", 1], "the sum",
                 "batch pos d_model", ask="is a part missing, or counted twice?")


def in_the_order_of_writing(decompose_stream):
    """embedding, positions, then attention and MLP of each layer"""
    model, _, cache = run()
    stack = decompose_stream(model, cache)
    expect(len(stack) == 6, f"a model of 2 layers has 6 parts, and there are {len(stack)}")
    expect_close(stack[0], cache["embed"], "part 0", "batch pos d_model")
    expect_close(stack[3], cache["mlp_out", 0], "part 3", "batch pos d_model",
                 ask="it should be the first layer's MLP")


# read_through_norm


def the_parts_and_b_sum_to_the_output(read_through_norm):
    """the parts, and b once, sum to what LayerNorm gives for their sum"""
    stack, w, b = random(4, 2, 3, 6), random(6, seed=1), random(6, seed=2)
    resid = stack.sum(0)
    scale = (resid.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    read = read_through_norm(stack, scale, w)
    expect_close(read.sum(0) + b, F.layer_norm(resid, (6,), w, b), "the sum, with b,",
                 "batch pos d_model")


def each_part_is_divided_by_the_same(read_through_norm):
    """a part that is twice as large counts twice as much"""
    stack, scale, w = random(3, 1, 2, 6), torch.full((1, 2, 1), 2.0), torch.ones(6)
    doubled = stack.clone()
    doubled[1] *= 2
    expect_close(read_through_norm(doubled, scale, w)[1], 2 * read_through_norm(stack, scale, w)[1],
                 "a part that was doubled", "batch pos d_model", ask="`scale` divides, whatever "
                 "the part; and a part loses its own mean, not that of the others")


def a_constant_counts_for_nothing(read_through_norm):
    """a part that is the same in all dimensions is removed by centring"""
    read = read_through_norm(torch.ones(1, 1, 1, 6), torch.ones(1, 1, 1), torch.ones(6))
    expect_close(read, torch.zeros(1, 1, 1, 6), "the reading of a constant",
                 "component batch pos d_model", ask="centred, it is 0, and `scale` divides that")


# attribute_logits


def they_sum_to_the_logit_difference(attribute_logits):
    """all parts, b's included, sum to the logit difference"""
    model, logits, cache = run()
    parts = attribute_logits(model, cache, CORRECT, WRONG)
    rows = torch.arange(2)
    want = logits[rows, -1, CORRECT] - logits[rows, -1, WRONG]
    expect(getattr(parts, "shape", None) == (7, 2), "of 2 layers and 2 texts there should be 6 "
           f"parts and b's: [7, 2], not {list(getattr(parts, 'shape', []))}")
    expect_close(parts.sum(0), want, "the sum", "batch", tolerance=1e-3)


def a_part_is_what_its_write_is_worth(attribute_logits):
    """the last MLP's part is its write, through LayerNorm's scale, along W_U's difference"""
    model, _, cache = run()
    end = cache["mlp_out", 1][:, -1]
    read = (end - end.mean(-1, keepdim=True)) / cache["scale", None][:, -1] * model.ln_final.w
    want = (read * (model.W_U[:, CORRECT] - model.W_U[:, WRONG]).T).sum(-1)
    expect_close(attribute_logits(model, cache, CORRECT, WRONG)[5], want, "the last MLP's part",
                 "batch", tolerance=1e-3)


# read_early


def the_last_row_is_the_model(read_early):
    """the last row is the model's logits"""
    model, logits, cache = run()
    rows = read_early(model, cache)
    expect(len(rows) == 3, f"a model of 2 layers has 3 rows, one before each block and one after "
           f"the last, and there are {len(rows)}")
    expect_close(rows[-1], logits, "the last row", "batch pos d_vocab")


def the_first_row_has_read_nothing(read_early):
    """the first row is the embedding, unembedded, LayerNorm included"""
    model, _, cache = run()
    resid = model.embed(TOKENS)
    expect_close(read_early(model, cache)[0], model.unembed(resid), "the first row",
                 "batch pos d_vocab", ask="the last LayerNorm belongs to the lens")


# norm_shares


def shares_sum_to_one(norm_shares):
    """they sum to 1"""
    expect_close(norm_shares(random(4, 2, 3, 6)).sum(0), torch.ones(2, 3), "the sum of the shares",
                 "batch pos")


def who_writes_against_it_is_negative(norm_shares):
    """of (3, 0) and (-1, 0) the shares are 3/2 and -1/2"""
    stack = torch.tensor([[3.0, 0], [-1.0, 0]])[:, None, None]
    expect_close(norm_shares(stack), torch.tensor([1.5, -0.5])[:, None, None], "the share",
                 "component batch pos")


def what_stands_across_counts_nothing_alone(norm_shares):
    """of (3, 0) and (0, 4), with the stream (3, 4), the shares are 9/25 and 16/25"""
    stack = torch.tensor([[3.0, 0], [0, 4.0]])[:, None, None]
    expect_close(norm_shares(stack), torch.tensor([9 / 25, 16 / 25])[:, None, None], "the share",
                 "component batch pos")


# effective_rank


def equal_values_count_one_each(effective_rank):
    """the identity of 5 dimensions has rank 5, a projector on 2 of them rank 2"""
    expect_close(effective_rank(torch.eye(5)), 5.0, "the effective rank of the identity",
                 tolerance=1e-3)
    projector = torch.diag(torch.tensor([1.0, 1, 0, 0, 0]))
    expect_close(effective_rank(projector), 2.0, "that of a projector on 2 dimensions",
                 tolerance=1e-3, ask="a singular value of 0 adds nothing, and 0 ln 0 is 0, not NaN")


def uneven_values_count_less(effective_rank):
    """singular values of 3 and 1 have exp of the entropy of (3/4, 1/4), 1.755"""
    matrix = torch.diag(torch.tensor([3.0, 1]))
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    expect_close(effective_rank(matrix), want, "the effective rank", ask="shares of the singular "
                 "values themselves")


def its_size_does_not_matter(effective_rank):
    """ten times the matrix has the same"""
    expect_close(effective_rank(10 * random(4, 6)), effective_rank(random(4, 6)),
                 "that of ten times the matrix", tolerance=1e-3)


# composition_score


def who_reads_elsewhere_scores_nothing(composition_score):
    """one writes dimension 0, the other reads dimension 1: 0"""
    written, read = torch.zeros(3, 3), torch.zeros(3, 3)
    written[2, 0] = 1
    read[1, 2] = 1
    expect_close(composition_score(written, read), 0.0, "the score", ask="the first matrix writes "
                                                                         "on its right side")
    read = torch.zeros(3, 3)
    read[0, 1] = 1
    expect_close(composition_score(written, read), 1.0, "the score where it reads dimension 0")


def sizes_do_not_matter(composition_score):
    """ten times the weights have the same score"""
    one, other = random(4, 4), random(4, 4, seed=1)
    want = (one @ other).norm() / one.norm() / other.norm()
    expect_close(composition_score(10 * one, other), want, "the score", ask="Frobenius norms, of "
                 "the product and of both")


EXERCISES = [
    Exercise(
        name="logit_difference", source=None, minutes=5, difficulty=1,
        needed_for="every question with two answers", task="Compute the metric of chapters 8 to "
                                                           "12.",
        checks=(it_reads_the_last_position, it_is_the_log_of_the_odds),
        hints=("logits[:, -1] are the last position's, [batch, d_vocab].",
               "Row i needs column correct[i].", "last[torch.arange(len(last)), correct]."),
        mistakes=(
            Mistake("of the first position", "logits[:, -1]", "logits[:, 0]"),
            Mistake("of wrong minus correct", "last[rows, correct] - last[rows, wrong]",
                    "last[rows, wrong] - last[rows, correct]"),
            Mistake("of probabilities instead of logits", "last = logits[:, -1]",
                    "last = logits[:, -1].softmax(-1)"),
            Mistake("with the first row's answers for all",
                    "last[rows, correct] - last[rows, wrong]",
                    "last[:, correct[0]] - last[:, wrong[0]]"),
            Mistake("of every row with the answers of every row",
                    "last[rows, correct] - last[rows, wrong]",
                    "last[:, correct] - last[:, wrong]"),
            Mistake("at all positions instead of the last",
                    "last[rows, correct] - last[rows, wrong]",
                    "logits[rows, :, correct] - logits[rows, :, wrong]"),
        )),
    Exercise(
        name="target_rank", source=None, minutes=10, difficulty=1, needed_for="the lens",
        task="Count the tokens above the target.",
        checks=(the_likeliest_has_rank_zero, it_counts_at_the_last_position),
        hints=("Compare all logits of a row with the target's.", "A sum of booleans counts.",
               "(last > own[:, None]).sum(-1)."),
        mistakes=(
            Mistake("counted from 1", "last > own", "last >= own"),
            Mistake("counted from the bottom", "last > own", "last < own"),
            Mistake("at the first position", "logits[:, -1]", "logits[:, 0]"),
            Mistake("when the logits are compared with the target's id, not with its logit",
                    "last > own[:, None]", "last > target[:, None]"),
            Mistake("of one argsort: which token has that rank, not which rank the token has",
                    "return (last > own[:, None]).sum(-1)",
                    "return last.argsort(-1, descending=True)"
                    "[torch.arange(len(last)), target]"),
        )),
    Exercise(
        name="decompose_stream", source=None, minutes=10, difficulty=1,
        needed_for="attribute_logits", task="Stack everything that was added to the stream.",
        checks=(the_parts_sum_to_the_stream, in_the_order_of_writing),
        hints=("The stream begins with the embedding and the positions.",
               "Each layer adds attn_out and then mlp_out.", "torch.stack of the list."),
        mistakes=(
            Mistake("without the positions", 'writes = [cache["embed"], cache["pos_embed"]]',
                    'writes = [cache["embed"]]'),
            Mistake("without the embedding", 'writes = [cache["embed"], cache["pos_embed"]]',
                    'writes = [cache["pos_embed"]]'),
            Mistake("without the last layer", "range(model.cfg.n_layers)",
                    "range(model.cfg.n_layers - 1)"),
            Mistake("with all attention layers before all MLPs",
                    '        writes.append(cache["mlp_out", layer])\n',
                    '    for layer in range(model.cfg.n_layers):\n'
                    '        writes.append(cache["mlp_out", layer])\n'),
            Mistake("of streams, which hold all writes before them, instead of writes",
                    'cache["attn_out", layer]', 'cache["resid_mid", layer]',
                    also=(('cache["mlp_out", layer]', 'cache["resid_post", layer]'),)),
            Mistake("with the MLPs before attention",
                    '        writes.append(cache["attn_out", layer])\n'
                    '        writes.append(cache["mlp_out", layer])\n',
                    '        writes.append(cache["mlp_out", layer])\n'
                    '        writes.append(cache["attn_out", layer])\n'),
        )),
    Exercise(
        name="read_through_norm", source=None, minutes=15, difficulty=2,
        needed_for="attribute_logits", task="LayerNorm is linear if its scale is given.",
        checks=(a_constant_counts_for_nothing, each_part_is_divided_by_the_same,
                the_parts_and_b_sum_to_the_output),
        hints=("Centring is linear: each part loses its own mean.",
               "Dividing by the whole stream's scale is linear; by a part's own it is not.",
               "(stack - stack.mean(-1, keepdim=True)) / scale * w."),
        mistakes=(
            Mistake("when the parts are not centred", "stack - stack.mean(-1, keepdim=True)",
                    "stack"),
            Mistake("when each part is divided by its own scale", "centred / scale",
                    "centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()"),
            Mistake("without LayerNorm's weight", " / scale * w", " / scale"),
            Mistake("without the division by the scale", " / scale", ""),
            Mistake("times the scale, instead of divided by it", "centred / scale",
                    "centred * scale"),
            Mistake("when the weight comes before the centring",
                    "    return centred / scale * w\n",
                    "    read = stack / scale * w\n"
                    "    return read - read.mean(-1, keepdim=True)\n"),
        )),
    Exercise(
        name="attribute_logits", source=None, minutes=25, difficulty=3,
        needed_for="finding which part wrote an answer (chapters 9 to 12)",
        task="Direct logit attribution, on the model as it is.",
        checks=(they_sum_to_the_logit_difference, a_part_is_what_its_write_is_worth),
        hints=("The difference of two columns of W_U is a direction: the logit difference is the "
               "dot product of LayerNorm's output with it.",
               "Each part, read through LayerNorm, has a dot product with it; so has b.",
               "(read * directions).sum(-1), and directions @ model.ln_final.b as the last row."),
        mistakes=(
            Mistake("of wrong minus correct",
                    "model.W_U[:, correct] - model.W_U[:, wrong]",
                    "model.W_U[:, wrong] - model.W_U[:, correct]"),
            Mistake("at the first position", "[:, :, -1:]", "[:, :, :1]",
                    also=(('cache["scale", None][:, -1:]', 'cache["scale", None][:, :1]'),)),
            Mistake("with the scale of another position", 'cache["scale", None][:, -1:]',
                    'cache["scale", None][:, :1]'),
            Mistake("for the correct answer alone",
                    "(model.W_U[:, correct] - model.W_U[:, wrong]).T", "model.W_U[:, correct].T"),
            Mistake("when b's part is left at 0", "directions @ model.ln_final.b",
                    "0 * directions @ model.ln_final.b"),
            Mistake("when the parts are not centred",
                    'read_through_norm(stack, cache["scale", None][:, -1:], model.ln_final.w)',
                    'stack / cache["scale", None][:, -1:] * model.ln_final.w'),
            Mistake("without LayerNorm's weight",
                    'read_through_norm(stack, cache["scale", None][:, -1:], model.ln_final.w)',
                    'read_through_norm(stack, cache["scale", None][:, -1:], 1.0)'),
            Mistake("when the parts are not read through LayerNorm",
                    'read_through_norm(stack, cache["scale", None][:, -1:], model.ln_final.w)',
                    'stack'),
            Mistake("when each part has a LayerNorm of its own",
                    'read_through_norm(stack, cache["scale", None][:, -1:], model.ln_final.w)',
                    'model.ln_final(stack)'),
            Mistake("when b is divided by the scale too", "directions @ model.ln_final.b",
                    "directions @ model.ln_final.b / cache[\"scale\", None][:, -1, 0]"),
        )),
    Exercise(
        name="read_early", source=None, minutes=10, difficulty=1,
        needed_for="watching an answer form", task="Read every stream with the model's own "
                                                   "unembedding.",
        checks=(the_last_row_is_the_model, the_first_row_has_read_nothing),
        hints=("Every stream has the width that unembed reads.",
               "The streams before each block, then the one after the last.",
               "torch.stack([model.unembed(resid) for resid in rows])."),
        mistakes=(
            Mistake("without the last LayerNorm", "model.unembed(resid) for",
                    "resid @ model.W_U for"),
            Mistake("after each block, without the stream before the first",
                    'cache["resid_pre", layer] for layer in range(model.cfg.n_layers)',
                    'cache["resid_post", layer] for layer in range(model.cfg.n_layers)'),
            Mistake("of what each layer's MLP wrote, instead of the stream",
                    'rows = [cache["resid_pre", layer]', 'rows = [cache["mlp_out", layer]'),
            Mistake("with the last LayerNorm twice: unembed has it", "model.unembed(resid) for",
                    "model.unembed(model.ln_final(resid)) for"),
            Mistake("after the softmax: probabilities", "torch.stack([model.unembed(resid) "
                    "for resid in rows])", "torch.stack([model.unembed(resid) for resid in rows])"
                    ".softmax(-1)"),
        )),
    Exercise(
        name="norm_shares", source=None, minutes=10, difficulty=1, needed_for="norm budgets",
        task="Lengths do not add up; dot products with the sum do.",
        checks=(shares_sum_to_one, who_writes_against_it_is_negative,
                what_stands_across_counts_nothing_alone),
        hints=("Sum over parts of <c, r> is <r, r>.", "resid = stack.sum(0).",
               "(stack * resid).sum(-1) / resid.pow(2).sum(-1)."),
        mistakes=(
            Mistake("of each part's own length", "(stack * resid).sum(-1)", "stack.pow(2).sum(-1)"),
            Mistake("as cosines", "/ resid.pow(2).sum(-1)",
                    "/ (resid.norm(dim=-1) * stack.norm(dim=-1))"),
            Mistake("with the length instead of its square", "resid.pow(2).sum(-1)",
                    "resid.norm(dim=-1)"),
            Mistake("of lengths over the stream's length, which do not add up",
                    "(stack * resid).sum(-1) / resid.pow(2).sum(-1)",
                    "stack.norm(dim=-1) / resid.norm(dim=-1)"),
            Mistake("of lengths over the sum of all lengths: none can be negative",
                    "(stack * resid).sum(-1) / resid.pow(2).sum(-1)",
                    "stack.norm(dim=-1) / stack.norm(dim=-1).sum(0)"),
            Mistake("of squares over the sum of all squares: none can be negative",
                    "(stack * resid).sum(-1) / resid.pow(2).sum(-1)",
                    "stack.pow(2).sum(-1) / stack.pow(2).sum((0, -1))"),
            Mistake("of absolute numbers", "(stack * resid).sum(-1)",
                    "(stack * resid).sum(-1).abs()"),
            Mistake("with the mean of the parts instead of their sum", "stack.sum(0)",
                    "stack.mean(0)"),
        )),
    Exercise(
        name="effective_rank", source=None, minutes=10, difficulty=2,
        needed_for="what a head can carry", task="An entropy again, of singular values.",
        checks=(equal_values_count_one_each, uneven_values_count_less, its_size_does_not_matter),
        hints=("torch.linalg.svdvals gives the singular values.",
               "Shares: divided by their sum. Entropy: -sum p ln p, 0 ln 0 = 0.",
               "torch.special.entr(shares).sum().exp()."),
        mistakes=(
            Mistake("of the squares of the singular values", "torch.linalg.svdvals(matrix)",
                    "torch.linalg.svdvals(matrix) ** 2"),
            Mistake("without the exponential: the entropy itself", ".sum().exp()", ".sum()"),
            Mistake("when the values are not normalised", "values / values.sum()", "values"),
            Mistake("when they are divided by the largest", "values / values.sum()",
                    "values / values.max()"),
            Mistake("when they are divided by their length, the root of the sum of squares",
                    "values / values.sum()", "values / values.norm()"),
            Mistake("without the minus sign of the entropy", "torch.special.entr(shares)",
                    "(-torch.special.entr(shares))"),
        )),
    Exercise(
        name="composition_score", source=None, minutes=10, difficulty=2,
        needed_for="induction (chapter 11)", task="Find which head reads which, from weights "
                                                  "alone.",
        checks=(who_reads_elsewhere_scores_nothing, sizes_do_not_matter),
        hints=("A row vector goes through the first matrix, then the second.",
               "The norm of the product, over both norms.",
               "(written @ read).norm() / (written.norm() * read.norm())."),
        mistakes=(
            Mistake("in the wrong order", "(written @ read)", "(read @ written)"),
            Mistake("without the division by both norms",
                    " / (written.norm() * read.norm())", ""),
            Mistake("with the second matrix transposed", "written @ read", "written @ read.T"),
            Mistake("when one norm divides and the other multiplies: a / b * c is (a / b) * c",
                    " / (written.norm() * read.norm())", " / written.norm() * read.norm()"),
            Mistake("of spectral norms, the largest singular value, instead of Frobenius norms",
                    "(written @ read).norm() / (written.norm() * read.norm())",
                    "torch.linalg.norm(written @ read, 2) / (torch.linalg.norm(written, 2)"
                    " * torch.linalg.norm(read, 2))"),
        )),
]

PREDICTIONS = [
    Prediction("A model has learned \"When Ola and Leo went to the park, Leo gave a kite to "
               "Ola\", and puts Ola 7 nats above Leo. How many of these nats does the last "
               "MLP add, which can't look back?",
               stated(8, "in our run it added {} of the … nats"), "Expected"),
    Prediction("A lens stops the model just before this MLP. In what percentage of such texts "
               "does the plain lens have the right name in front?",
               stated(8, "The plain lens has it in front in only {} % of the gifts"), "Expected"),
    Prediction("By how many nats does Ola lead if the heads of layer 0 are silenced, which write "
               "little to the logits?",
               stated(8, "Without the heads of layer 0 the lead is gone: {} nats"), "Expected"),
]
