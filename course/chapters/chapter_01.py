"""Chapter 1, the mathematical language: surprise, its gradient, and GELU's."""

import math

import torch
import torch.nn.functional as F

from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import expect, expect_close, expect_equal, random, random_ids
from losses import IGNORED
from mlp import gelu_by_definition

IMPORTS = ["import math", "import torch", "from losses import IGNORED"]


# log_probabilities


def they_are_a_distribution(log_probabilities):
    """exp of them sums to 1"""
    total = log_probabilities(random(3, 5)).exp().sum(-1)
    expect_close(total, torch.ones(3), "the sum of the probabilities", "row")


def odds_are_differences_of_logits(log_probabilities):
    """logits of 0 and ln 3 are probabilities of 1/4 and 3/4"""
    logs = log_probabilities(torch.tensor([0.0, math.log(3)]))
    expect_close(logs, torch.tensor([0.25, 0.75]).log(), "log p", "token")


def large_logits_do_not_overflow(log_probabilities):
    """logits of 1000 and 0 give log probabilities of 0 and -1000"""
    logs = log_probabilities(torch.tensor([[1000.0, 0.0]]))
    expect_close(logs, torch.tensor([[0.0, -1000.0]]), "log p", "row token",
                 ask="exp(1000) is infinite, and log(exp(-1000)) is -infinite; which number can "
                     "you subtract from all logits without changing the result?")


def each_row_is_on_its_own(log_probabilities):
    """a row of small logits beside a row of large ones"""
    logs = log_probabilities(torch.tensor([[1000.0, 1000.0], [0.0, 0.0]]))
    expect_close(logs, torch.full((2, 2), 0.5).log(), "log p", "row token",
                 ask="which number do you subtract from the second row?")


def log_probabilities_leave_the_logits_alone(log_probabilities):
    """the logits that are passed in do not change"""
    logits = random(3, 5)
    log_probabilities(logits)
    expect_close(logits, random(3, 5), "after the call a logit", "row token",
                 ask="did you write into the argument, with -= for example?")


# entropy


def even_is_ln_of_the_number(entropy):
    """four equally likely tokens have entropy ln 4"""
    expect_close(entropy(torch.zeros(4)), math.log(4), "the entropy",
                 ask="the sum of all surprises, each weighted by its probability, in nats")


def certain_is_zero(entropy):
    """a certain token has entropy 0"""
    expect_close(entropy(torch.tensor([200.0, 0, 0])), 0.0, "the entropy",
                 ask="a probability of 0 has the logarithm -inf, but 0 log 0 is 0")


def each_row_has_its_own(entropy):
    """of [..., d_vocab] it gives [...]"""
    logits = random(2, 3, 5)
    want = torch.distributions.Categorical(logits=logits).entropy()
    expect_close(entropy(logits), want, "the entropy", "batch pos")


# per_token_loss


def half_costs_ln_two(per_token_loss):
    """a token of probability 1/2 costs ln 2"""
    loss = per_token_loss(torch.zeros(1, 2), torch.tensor([1]))
    expect_close(loss, torch.tensor([math.log(2)]), "the loss", "row")


def it_reads_the_target_s_column(per_token_loss):
    """the loss of each row is that of its own target"""
    logits, targets = random(2, 3, 7), random_ids(7, 2, 3)
    want = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expect_close(per_token_loss(logits, targets), want, "the loss", "batch pos")


def ignored_targets_cost_nothing(per_token_loss):
    """an IGNORED target costs 0, and the others cost the same as before"""
    logits, targets = random(4, 7), torch.tensor([3, IGNORED, 0, IGNORED])
    want = F.cross_entropy(logits, targets, reduction="none")
    expect_close(per_token_loss(logits, targets), want, "the loss", "row")
    expect_equal(targets.tolist(), [3, IGNORED, 0, IGNORED], "the tensor of targets after the call",
                 ask="did you write into the argument?")


# cross_entropy


def a_uniform_guess_costs_ln_of_the_vocabulary(cross_entropy):
    """a uniform guess costs ln d_vocab"""
    expect_close(cross_entropy(torch.zeros(6, 65), random_ids(65, 6)), math.log(65),
                 "the loss of a uniform guess over 65 tokens")


def it_is_the_mean(cross_entropy):
    """it is the mean over all positions of all texts"""
    logits, targets = random(2, 3, 7), random_ids(7, 2, 3)
    expect_close(cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1),
                                                                 targets.flatten()), "the loss")


def ignored_targets_are_not_counted(cross_entropy):
    """the mean is only over the targets that count"""
    logits, targets = random(4, 7), torch.tensor([3, IGNORED, 0, IGNORED])
    expect_close(cross_entropy(logits, targets), F.cross_entropy(logits, targets),
                 "the loss with 2 of 4 targets ignored", ask="divide by the number that count")


def each_target_counts_as_much_as_any_other(cross_entropy):
    """one text with 3 targets and one with 1: each target counts for a quarter"""
    logits = random(2, 3, 7)
    targets = torch.tensor([[3, 1, 0], [IGNORED, 2, IGNORED]])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expect_close(cross_entropy(logits, targets), want, "the loss of 3 targets and 1",
                 ask="one mean over all targets, not a mean of the texts' means")


def a_target_that_costs_nothing_counts(cross_entropy):
    """of a certain target and an even guess between two, the mean is ln 2 / 2"""
    loss = cross_entropy(torch.tensor([[200.0, 0], [0, 0]]), torch.tensor([0, 1]))
    expect_close(loss, math.log(2) / 2, "the loss", ask="a cost of 0 does not mean that the target "
                                                        "is ignored")


def it_can_be_differentiated(cross_entropy):
    """its gradient reaches the logits"""
    logits = random(3, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    expect(isinstance(loss, torch.Tensor) and loss.requires_grad, "the loss has no gradient: was a "
           "number taken out of its tensor (.item(), float) on the way?")


# next_token_loss


def told_the_future_it_costs_nothing(next_token_loss):
    """logits that name the next token cost 0"""
    tokens = random_ids(7, 2, 5)
    logits = torch.zeros(2, 5, 7)
    logits[:, :-1] = 200.0 * F.one_hot(tokens[:, 1:], 7)
    expect_close(next_token_loss(logits, tokens), 0.0, "the loss of naming the next token",
                 ask="position i is scored on token i + 1")


def naming_the_token_that_is_there_does_not_help(next_token_loss):
    """logits that name the present token do not predict the next one"""
    tokens = torch.tensor([[0, 1, 2, 3]])
    loss = next_token_loss(200.0 * F.one_hot(tokens, 4), tokens)
    expect(loss > 100, f"logits that name the present token cost {loss:.3g}, and should cost 200: "
           "are the targets shifted?")


def it_is_the_mean_over_predictions(next_token_loss):
    """of 5 tokens there are 4 predictions"""
    logits, tokens = random(2, 5, 7), random_ids(7, 2, 5)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expect_close(next_token_loss(logits, tokens), want, "the loss")


# kl_divergence


def agreeing_costs_nothing(kl_divergence):
    """KL(p || p) is 0, also if a constant is added to all logits"""
    logits = random(3, 5)
    expect_close(kl_divergence(logits, logits + 7), torch.zeros(3), "KL(p || p)", "row",
                 ask="sum p (log p - log q); a constant added to all logits changes no probability")


def it_is_the_excess_over_the_entropy(kl_divergence):
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = ln 2 - ln 3 / 2"""
    p, q = torch.zeros(2), torch.tensor([0.0, math.log(3)])
    want = math.log(2) - 0.5 * math.log(3)
    expect_close(kl_divergence(p, q), want, "KL(p || q)", ask="in nats; which of the two is the "
                                                              "weight in the sum?")


def each_row_has_its_own_kl(kl_divergence):
    """of [..., d_vocab] it gives [...], none below 0"""
    p, q = random(2, 3, 5), random(2, 3, 5, seed=1)
    want = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    expect_close(kl_divergence(p, q), want, "KL(p || q)", "batch pos")


# cross_entropy_gradient


def the_gradient_of_each_row_sums_to_zero(cross_entropy_gradient):
    """each row sums to 0"""
    gradient = cross_entropy_gradient(random(3, 5), torch.tensor([0, 4, 2]))
    expect_close(gradient.sum(-1), torch.zeros(3), "the sum of a row", "row",
                 ask="the probabilities sum to 1, and so does the one-hot vector")


def the_target_is_pushed_up(cross_entropy_gradient):
    """the target's entry is negative: a step against it raises the target's logit"""
    gradient = cross_entropy_gradient(torch.zeros(1, 4), torch.tensor([2]))
    expect_close(gradient, torch.tensor([[0.25, 0.25, -0.75, 0.25]]), "the gradient", "row token")


def it_equals_autograd(cross_entropy_gradient):
    """it equals autograd's gradient of the mean over rows"""
    logits = random(3, 5).requires_grad_()
    targets = torch.tensor([0, 4, 2])
    F.cross_entropy(logits, targets).backward()
    expect_close(cross_entropy_gradient(logits.detach().clone(), targets), logits.grad,
                 "the gradient", "row token")


def the_logits_are_left_alone(cross_entropy_gradient):
    """the logits that are passed in do not change"""
    logits = random(3, 5)
    cross_entropy_gradient(logits, torch.tensor([0, 4, 2]))
    expect_close(logits, random(3, 5), "after the call a logit", "row token",
                 ask="did you write into the argument?")


# gelu_gradient


def far_right_it_is_one(gelu_gradient):
    """far to the right GELU is x, and its slope 1; far to the left it is 0"""
    expect_close(gelu_gradient(torch.tensor([8.0, -8.0])), torch.tensor([1.0, 0.0]),
                 "the slope at 8 and -8", "entry")


def at_zero_it_is_a_half(gelu_gradient):
    """at 0 the slope is 1/2"""
    expect_close(gelu_gradient(torch.tensor([0.0])), torch.tensor([0.5]), "the slope at 0", "entry")


def it_equals_finite_differences(gelu_gradient):
    """it equals the difference quotient of gelu"""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    want = (gelu_by_definition(x + 1e-6) - gelu_by_definition(x - 1e-6)) / 2e-6
    expect_close(gelu_gradient(x), want, "the slope at -3, -2.5, …, 3", "entry",
                 ask="the product rule, and the chain rule for u")


EXERCISES = [
    Exercise(
        name="log_probabilities", source="losses.log_probabilities", minutes=10, difficulty=1,
        needed_for="every loss",
        task="Compute softmax and logarithm together, without log_softmax.",
        checks=(they_are_a_distribution, odds_are_differences_of_logits,
                large_logits_do_not_overflow, each_row_is_on_its_own,
                log_probabilities_leave_the_logits_alone),
        hints=("log softmax is logits - log(sum(exp(logits))).",
               "A constant added to all logits changes no probability: subtract the largest first.",
               "logits - logits.max(-1, keepdim=True).values, then minus its exp().sum(-1, "
               "keepdim=True).log()."),
        mistakes=(
            Mistake("when the largest logit is not subtracted first: exp overflows",
                    "    logits = logits - logits.max(-1, keepdim=True).values  # the largest is "
                    "0: exp can't overflow\n", ""),
            Mistake("when the largest logit of all rows is subtracted from each of them",
                    "logits.max(-1, keepdim=True).values", "logits.max()"),
            Mistake("without the logarithm of the sum", ".sum(-1, keepdim=True).log()",
                    ".sum(-1, keepdim=True)"),
            Mistake("with the mean instead of the sum", "logits.exp().sum(", "logits.exp().mean("),
            Mistake("with the sum over rows instead of tokens", "logits.exp().sum(-1,",
                    "logits.exp().sum(0,"),
            Mistake("with one sum over all rows", "logits.exp().sum(-1, keepdim=True)",
                    "logits.exp().sum()"),
            Mistake("with probabilities instead of their logarithms",
                    "return logits - logits.exp().sum(-1, keepdim=True).log()",
                    "return logits.softmax(-1)"),
            Mistake("when the largest logit is subtracted in the sum only",
                    "    logits = logits - logits.max(-1, keepdim=True).values  # the largest is "
                    "0: exp can't overflow\n",
                    "    largest = logits.max(-1, keepdim=True).values\n",
                    also=(("logits.exp().sum(", "(logits - largest).exp().sum("),)),
        )),
    Exercise(
        name="entropy", source=None, minutes=10, difficulty=1, needed_for="the floor (chapter 2)",
        task="Measure how uncertain a distribution is.",
        checks=(even_is_ln_of_the_number, certain_is_zero, each_row_has_its_own),
        hints=("The surprise of a token is -log p, and it comes with probability p.",
               "Take both from log_probabilities: p is its exp.",
               "logs = log_probabilities(logits); -(logs.exp() * logs).sum(-1)."),
        mistakes=(
            Mistake("without the minus", "return -(", "return ("),
            Mistake("in bits instead of nats", "(logs.exp() * logs)",
                    "(logs.exp() * logs / math.log(2))"),
            Mistake("with the mean over tokens instead of the expectation",
                    "(logs.exp() * logs).sum(-1)", "logs.mean(-1)"),
            Mistake("with the mean over tokens instead of the sum", "(logs.exp() * logs).sum(-1)",
                    "(logs.exp() * logs).mean(-1)"),
            Mistake("when the surprises are not weighted by their probabilities",
                    "(logs.exp() * logs)", "logs"),
            Mistake("when the logits are taken for log probabilities",
                    "logs = log_probabilities(logits)", "logs = logits"),
        )),
    Exercise(
        name="per_token_loss", source="losses.per_token_loss", minutes=15, difficulty=1,
        needed_for="cross_entropy", task="Pick the target's log probability, with a minus.",
        checks=(half_costs_ln_two, it_reads_the_target_s_column, ignored_targets_cost_nothing),
        hints=("From each row of log probabilities one number is needed: torch.gather picks it.",
               "gather wants ids of the same number of axes: unsqueeze(-1), and squeeze after.",
               "IGNORED is not a column: replace it by 0, and multiply the result by 0."),
        mistakes=(
            Mistake("without the minus", "return -chosen", "return chosen"),
            Mistake("with the probability instead of its logarithm",
                    "log_probabilities(logits).gather", "logits.softmax(-1).gather"),
            Mistake("with 1 - p instead of -log p",
                    "log_probabilities(logits).gather", "logits.softmax(-1).gather",
                    also=(("return -chosen", "return 1 - chosen"),)),
            Mistake("with the logit itself, not normalised", "log_probabilities(logits).gather",
                    "logits.gather"),
            Mistake("when ignored targets count as token 0", " * counts", ""),
        )),
    Exercise(
        name="cross_entropy", source="losses.cross_entropy", minutes=10, difficulty=1,
        needed_for="training (chapter 6)", task="The mean of per_token_loss, over what counts.",
        checks=(a_uniform_guess_costs_ln_of_the_vocabulary, it_is_the_mean,
                ignored_targets_are_not_counted, each_target_counts_as_much_as_any_other,
                a_target_that_costs_nothing_counts, it_can_be_differentiated),
        hints=("per_token_loss gives 0 for ignored targets, so the sum is right already.",
               "Divide by the number of targets that are not IGNORED.",
               "per_token_loss(logits, targets).sum() / (targets != IGNORED).sum()."),
        mistakes=(
            Mistake("when ignored targets are counted in the mean", "(targets != IGNORED).sum()",
                    "targets.numel()"),
            Mistake("with the sum instead of the mean", " / (targets != IGNORED).sum()", ""),
            Mistake("when it is divided by the number of texts, not of targets",
                    "(targets != IGNORED).sum()", "len(targets)"),
            Mistake("when ignored targets count as token 0", "per_token_loss(logits, targets)",
                    "per_token_loss(logits, targets.clamp(min=0))",
                    also=(("(targets != IGNORED).sum()", "targets.numel()"),)),
            Mistake("with the mean of the texts' means",
                    "losses.sum() / (targets != IGNORED).sum()",
                    "(losses.sum(-1) / (targets != IGNORED).sum(-1)).mean()"),
            Mistake("when targets that cost 0 are not counted", "(targets != IGNORED).sum()",
                    "(losses != 0).sum()"),
            Mistake("when the loss is taken out of its tensor",
                    "losses.sum() / (targets != IGNORED).sum()",
                    "torch.tensor((losses.sum() / (targets != IGNORED).sum()).item())"),
        )),
    Exercise(
        name="next_token_loss", source="losses.next_token_loss", minutes=10, difficulty=2,
        needed_for="every loss of a text", task="Shift by one, the right way round.",
        checks=(told_the_future_it_costs_nothing, naming_the_token_that_is_there_does_not_help,
                it_is_the_mean_over_predictions),
        hints=("The logits at position 0 predict token 1.",
               "The last position has no target, and the first token has no prediction: drop both.",
               "per_token_loss(logits[:, :-1], tokens[:, 1:]).mean()."),
        mistakes=(
            Mistake("when the targets are not shifted: each token is predicted from itself",
                    "logits[:, :-1], tokens[:, 1:]", "logits, tokens"),
            Mistake("when the shift goes the wrong way: the token before is predicted",
                    "logits[:, :-1], tokens[:, 1:]", "logits[:, 1:], tokens[:, :-1]"),
            Mistake("when the last position is scored on the first token (roll)",
                    "logits[:, :-1], tokens[:, 1:]", "logits, tokens.roll(-1, 1)"),
            Mistake("when the last position is dropped from both, and nothing is shifted",
                    "logits[:, :-1], tokens[:, 1:]", "logits[:, :-1], tokens[:, :-1]"),
            Mistake("when the texts are shifted, not the positions",
                    "logits[:, :-1], tokens[:, 1:]", "logits[:-1], tokens[1:]"),
            Mistake("with the sum instead of the mean", "losses.mean()", "losses.sum()"),
            Mistake("when it is divided by the number of tokens, not of predictions",
                    "losses.mean()", "losses.sum() / tokens.numel()"),
            Mistake("with the sum over each text, and the mean over texts", "losses.mean()",
                    "losses.sum(1).mean()"),
            Mistake("with a shift of two", "logits[:, :-1], tokens[:, 1:]",
                    "logits[:, :-2], tokens[:, 2:]"),
        )),
    Exercise(
        name="kl_divergence", source="losses.kl_divergence", minutes=10, difficulty=2,
        needed_for="lenses (chapter 8), circuits (chapter 10)",
        task="Measure the extra cost of believing q if p is true.",
        checks=(agreeing_costs_nothing, it_is_the_excess_over_the_entropy,
                each_row_has_its_own_kl),
        hints=("Both need log_probabilities first.",
               "The tokens come with probability p, so p is the weight in the sum.",
               "(p_log.exp() * (p_log - q_log)).sum(-1)."),
        mistakes=(
            Mistake("of the other direction, KL(q || p)", "p_log.exp() * (p_log - q_log)",
                    "q_log.exp() * (q_log - p_log)"),
            Mistake("when logits are taken for log probabilities",
                    "    p_log = log_probabilities(p_logits)\n"
                    "    q_log = log_probabilities(q_logits)\n",
                    "    p_log = p_logits\n    q_log = q_logits\n"),
            Mistake("with the mean over tokens instead of the sum", ".sum(-1)", ".mean(-1)"),
            Mistake("with the opposite sign", "(p_log - q_log)", "(q_log - p_log)"),
            Mistake("when q is the weight in the sum, not p", "p_log.exp() *", "q_log.exp() *"),
            Mistake("when the sum has no weights", "(p_log.exp() * (p_log - q_log))",
                    "(p_log - q_log)"),
            Mistake("in bits instead of nats", "(p_log.exp() * (p_log - q_log))",
                    "(p_log.exp() * (p_log - q_log) / math.log(2))"),
            Mistake("with the differences' absolute values", "(p_log - q_log)",
                    "(p_log - q_log).abs()"),
        )),
    Exercise(
        name="cross_entropy_gradient", source=None, minutes=20, difficulty=2,
        needed_for="seeing why training works (chapter 6)",
        task="Differentiate -log softmax on paper, then write it down; no autograd.",
        checks=(the_gradient_of_each_row_sums_to_zero, the_target_is_pushed_up,
                it_equals_autograd, the_logits_are_left_alone),
        hints=("The loss of a row is log(sum(exp(logits))) - logits[target]: differentiate each.",
               "The first gives softmax, the second 1 at the target.",
               "(softmax - one_hot(target)) / n, since the loss is the mean over n rows."),
        mistakes=(
            Mistake("without the division by the number of rows", "gradient / len(targets)",
                    "gradient"),
            Mistake("when it is divided by all entries", "gradient / len(targets)",
                    "gradient / gradient.numel()"),
            Mistake("with the opposite sign", "return gradient /", "return -gradient /"),
            Mistake("when 1 is subtracted in every row at the targets of all rows",
                    "gradient[torch.arange(len(targets)), targets]", "gradient[:, targets]"),
            Mistake("when the target's entry is set to -1, not lowered by 1", "targets] -= 1",
                    "targets] = -1"),
            Mistake("with softmax over rows instead of tokens", "logits.softmax(-1)",
                    "logits.softmax(0)"),
            Mistake("when it is divided by the size of the vocabulary", "gradient / len(targets)",
                    "gradient / logits.shape[-1]"),
            Mistake("when only the softmax is divided by the number of rows, not the 1",
                    "gradient = logits.softmax(-1)", "gradient = logits.softmax(-1) / len(targets)",
                    also=(("return gradient / len(targets)", "return gradient"),)),
            Mistake("when 1 is not subtracted at the target",
                    "    gradient[torch.arange(len(targets)), targets] -= 1  # p - "
                    "one_hot(target)\n",
                    ""),
        )),
    Exercise(
        name="gelu_gradient", source=None, minutes=20, difficulty=2,
        needed_for="the MLP (chapter 5)",
        task="The product rule, and the chain rule for tanh. The constant is 0.044715.",
        checks=(at_zero_it_is_a_half, far_right_it_is_one, it_equals_finite_differences),
        hints=("x/2 (1 + tanh u): the derivative is (1 + tanh u)/2 + x/2 (tanh u)'.",
               "(tanh u)' = (1 - tanh^2 u) u', and u' = sqrt(2/pi) (1 + 3 · 0.044715 x^2).",
               "t = torch.tanh(u); 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du."),
        mistakes=(
            Mistake("without the second half of the product rule",
                    " + 0.5 * x * (1 - t**2) * slope", ""),
            Mistake("without the derivative of u", " * slope", ""),
            Mistake("without the 3 that comes down from the cube", "3 * 0.044715", "0.044715"),
            Mistake("with 1 - t instead of 1 - t^2", "(1 - t**2)", "(1 - t)"),
            Mistake("of gelu itself, not of its derivative",
                    "return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope",
                    "return 0.5 * x * (1 + t)"),
            Mistake("of the exact GELU (with erf), not of GPT-2's",
                    "return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope",
                    "return 0.5 * (1 + torch.erf(x / 2**0.5)) "
                    "+ x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)"),
            Mistake("without x in the second half of the product rule", "0.5 * x * (1 - t**2)",
                    "0.5 * (1 - t**2)"),
            Mistake("without the 1/2 in the second half of the product rule",
                    "0.5 * x * (1 - t**2)", "x * (1 - t**2)"),
            Mistake("with u' instead of (2u)'", "0.5 * x * (1 - t**2)", "0.25 * x * (1 - t**2)"),
            Mistake("without sqrt(2/pi) in the derivative of u", "slope = root * (", "slope = ("),
            Mistake("with sigma(u) instead of sigma(2u)", "torch.tanh(root *",
                    "torch.tanh(0.5 * root *",
                    also=(("slope = root * (", "slope = 0.5 * root * ("),)),
        )),
]


def kl_ratio():
    """KL(q || p) / KL(p || q), as the chapter's block prints them."""
    forward, backward = page.find_numbers(1, "KL(p, q) = {}, KL(q, p) = {}")
    return backward / forward


PREDICTIONS = [
    Prediction("What does a uniform guess among 65 tokens cost, in nats?",
               lambda: math.log(65), "ln 65",
               printed="a uniform guess costs {} nats"),
    Prediction("p is sharp (5 times normal logits) and q nearly even (0.1 times the same logits), "
               "over 65 tokens. How many times as large as KL(p || q) is KL(q || p)?",
               kl_ratio, "the chapter's block: 11.9272 / 3.8122"),
]
