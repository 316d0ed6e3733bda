"""Chapter 6, learn and sample: schedule, clipping, AdamW, Muon's rounds, sampling, a cache."""


import torch

from attention import GrowingPast
from config import ModelConfig
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import (
    Wrong,
    expect,
    expect_close,
    expect_equal,
    expect_shape,
    random,
    random_ids,
)
from course.engine.page import stated
from losses import cross_entropy
from model import GPT
from optim import AdamW

IMPORTS = ["import math", "import torch", "from losses import cross_entropy",
           "from optim import POLAR_EXPRESS_ROUNDS"]


def tiny_model(n_ctx=8):
    """A GPT of 9 tokens, with weights so large that its predictions are not uniform."""
    return GPT(ModelConfig(n_layers=1, n_heads=2, d_model=8, n_ctx=n_ctx, d_vocab=9,
                           init_scale=0.5))


# schedule


def it_falls_linearly(schedule):
    """without warmup, 4 steps get 1, 3/4, 1/2 and 1/4"""
    shares = [schedule(step, 4) for step in range(4)]
    expect_close(torch.tensor(shares), torch.tensor([1, 0.75, 0.5, 0.25]), "the share", "step",
                 ask="it would be 0 at step 4, which is after the last step")


def it_rises_over_the_warmup(schedule):
    """with 4 steps of warmup: 1/4, 1/2, 3/4, 1, and then it falls from 1"""
    shares = [schedule(step, 8, 4) for step in range(6)]
    expect_close(torch.tensor(shares), torch.tensor([0.25, 0.5, 0.75, 1, 1, 0.75]), "the share",
                 "step", ask="the first step must not have size 0, and the fall begins after the "
                             "warmup")


def a_cosine_is_at_a_half_halfway(schedule):
    """shape="cosine" has 1 at first, 1/2 halfway and about 0.15 after three quarters"""
    steps = (0, 4, 6)
    shares = [schedule(step, 8, shape="cosine") for step in steps]
    for step, share, want in zip(steps, shares, (1.0, 0.5, 0.146447), strict=True):
        expect_close(share, want, f'the share at step {step} of 8 with shape="cosine"',
                     ask="half a cosine, from 0 to pi, shifted up and halved")


def it_ends_near_the_final_fraction(schedule):
    """final_fraction=0.3: 0.65 halfway, 0.3875 at step 7 of 8; a warmup still begins at 1/4"""
    shares = [schedule(step, 8, final_fraction=0.3) for step in (4, 7)]
    first = schedule(0, 8, 4, final_fraction=0.3)
    for step, share, want in zip((4, 7), shares, (0.65, 0.3875), strict=True):
        expect_close(share, want, f"the share at step {step} of 8")
    expect_close(first, 0.25, "the share at the first of 4 steps of warmup",
                 ask="the warmup rises to 1, whatever final_fraction is")


# clip_gradients_


def with_grads(*grads):
    """Parameters that have these gradients (None for one without)."""
    parameters = []
    for grad in grads:
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = None if grad is None else torch.tensor(grad)
        parameters.append(p)
    return parameters


def large_gradients_are_scaled_together(clip_gradients_):
    """gradients (1.5, 2) and (0, 6) have norm 6.5: most=1.3 makes them (0.3, 0.4) and (0, 1.2)"""
    one, other = with_grads([1.5, 2.0], [0, 6.0])
    clip_gradients_([one, other], 1.3)
    expect_close(torch.stack([one.grad, other.grad]), torch.tensor([[0.3, 0.4], [0, 1.2]]),
                 "the gradient", "parameter number", tolerance=1e-3, ask="use one norm over all "
                                                                         "of them, so that the "
                                                                         "direction stays the same")


def small_gradients_are_left_alone(clip_gradients_):
    """gradients of norm 5 do not change with most=10"""
    parameters = with_grads([3.0, 4.0])
    clip_gradients_(parameters, 10.0)
    expect_close(parameters[0].grad, torch.tensor([3.0, 4]), "the gradient", "number",
                 ask="clipping never scales up")


def the_norm_before_is_returned(clip_gradients_):
    """it returns 5, the norm before, and skips parameters without a gradient"""
    norm = clip_gradients_(with_grads([3.0, 0], None, [0, 4.0]), 1.0)
    expect_close(norm, 5.0, "what is returned", tolerance=1e-3)


# adamw_step


def optimiser(n_steps, step, *, lr=0.1, weight_decay=0.0, scale=1.0):
    """The weights, a matrix and a vector, after some steps along the same gradients."""
    weights = [torch.nn.Parameter(random(3, 2)), torch.nn.Parameter(random(3, seed=1))]
    adamw = AdamW(weights, lr, weight_decay=weight_decay)
    for number in range(n_steps):
        for seed, p in enumerate(weights):
            p.grad = scale * random(*p.shape, seed=10 * number + seed)
        step(adamw)
    return [p.detach() for p in weights]


def the_first_step_is_the_learning_rate(adamw_step):
    """the first step moves each weight by lr, against its gradient's sign"""
    before = random(3, 2)
    after = optimiser(1, adamw_step)[0]
    expect(not torch.equal(after, before), "the weights did not move at all: `p = p - …` would "
           "make a new tensor and leave the parameter; change it in place: p.sub_(…) or p -= …")
    expect_close(after - before, -0.1 * random(3, 2).sign(), "the first step of lr 0.1",
                 "row column", tolerance=1e-3, ask="m' / sqrt(v') is g / |g| at the first step, "
                                                   "if both averages are corrected for starting "
                                                   "at 0")


def the_gradient_s_size_does_not_matter(adamw_step):
    """gradients 1,000 times as large give the same steps"""
    expect_close(optimiser(5, adamw_step, scale=1000.0)[0], optimiser(5, adamw_step)[0],
                 "a weight after 5 steps with gradients 1,000 times as large", "row column",
                 tolerance=1e-3)


def the_share_scales_the_step(adamw_step):
    """with share=0.5 the step is half as long"""
    after = optimiser(1, lambda adamw: adamw_step(adamw, 0.5))[0]
    expect_close(after - random(3, 2), -0.05 * random(3, 2).sign(), "half a first step",
                 "row column", tolerance=1e-3)


def the_share_scales_the_decay(adamw_step):
    """with share=0.5 a step is one of half the learning rate, decay included"""
    halved = optimiser(3, lambda adamw: adamw_step(adamw, 0.5), weight_decay=0.5)[0]
    expect_close(halved, optimiser(3, adamw_step, lr=0.05, weight_decay=0.5)[0],
                 "a weight after 3 steps with share=0.5", "row column",
                 ask="the decay is share * lr * weight_decay * w")


def eps_stands_beside_the_root(adamw_step):
    """a first gradient as large as eps makes half a step: the two add up below the fraction"""
    p = torch.nn.Parameter(torch.ones(2))
    adamw = AdamW([p], 0.1, weight_decay=0.0)
    p.grad = torch.full((2,), adamw.eps)
    adamw_step(adamw)
    expect_close(p, torch.full((2,), 0.95), "a weight of 1 after a step with a gradient of eps",
                 "row", ask="eps is added to the root of v', and not under it")


def torch_s(n_steps, weight_decay):
    """What `optimiser` gives with torch's AdamW, where only the matrix decays."""
    weights = [torch.nn.Parameter(random(3, 2)), torch.nn.Parameter(random(3, seed=1))]
    reference = torch.optim.AdamW([{"params": weights[:1], "weight_decay": weight_decay},
                                   {"params": weights[1:], "weight_decay": 0.0}], lr=0.1)
    for number in range(n_steps):
        for seed, p in enumerate(weights):
            p.grad = random(*p.shape, seed=10 * number + seed)
        reference.step()
    return [p.detach() for p in weights]


def without_decay_it_is_adam(adamw_step):
    """20 steps without decay equal torch's Adam"""
    for got, want in zip(optimiser(20, adamw_step), torch_s(20, 0.0), strict=True):
        expect_close(got, want, "a weight after 20 steps without decay",
                     "row column" if want.ndim == 2 else "row",
                     ask="are m and v kept from step to step, uncorrected, and does step_count "
                         "rise once a step?")


def it_equals_torch_s(adamw_step):
    """20 steps with decay equal torch's AdamW, where only matrices decay"""
    matrix, vector = optimiser(20, adamw_step, weight_decay=0.5)
    want_matrix, want_vector = torch_s(20, 0.5)
    expect_close(vector, want_vector, "a vector's entry after 20 steps", "row",
                 ask="vectors do not decay")
    expect_close(matrix, want_matrix, "a matrix's entry after 20 steps", "row column",
                 ask="the decay is lr * weight_decay * w, subtracted separately and not added to "
                     "the gradient")


# orthogonalise


def singular_values_come_near_to_one(orthogonalise):
    """all singular values of the result lie between 0.7 and 1.3"""
    for shape in ((4, 10), (10, 4)):
        result = orthogonalise(random(*shape))
        expect(getattr(result, "shape", None) == shape, f"of a matrix {list(shape)} the result is "
               f"{list(getattr(result, 'shape', []))}")
        expect(bool(result.isfinite().all()), f"of a {shape[0]} x {shape[1]} matrix the result is "
               "not finite: was it divided by its norm first, and has each round its own a, b, c?")
        values = torch.linalg.svdvals(result)
        expect(bool((values > 0.7).all() and (values < 1.3).all()), f"the singular values of a "
               f"{shape[0]} x {shape[1]} matrix lie between {values.min():.3g} and "
               f"{values.max():.3g}")


def directions_stay(orthogonalise):
    """the result is U S' V^T with the U and V of the matrix"""
    matrix = random(4, 6)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = U.T @ orthogonalise(matrix) @ Vh.T
    off = (inside - inside.diag().diag()).abs().max()
    expect(off < 1e-3, f"U^T X V has an entry of {off:.3g} off its diagonal: were singular "
                       "directions mixed?")


def the_size_does_not_matter(orthogonalise):
    """a matrix 1,000 times as large gives the same"""
    expect_close(orthogonalise(1000 * random(4, 6)), orthogonalise(random(4, 6)),
                 "the result for 1,000 times the matrix", "row column", tolerance=1e-3)


def the_argument_stays(orthogonalise):
    """the matrix that is passed in does not change"""
    matrix = random(4, 6)
    orthogonalise(matrix)
    expect(torch.equal(matrix, random(4, 6)), "the matrix was written into")


# train_step


class CountedSteps:
    """An optimiser of plain gradient descent that counts its steps."""

    def __init__(self, model, lr):
        self.parameters = list(model.parameters())
        self.lr = lr
        self.step_count = 0

    def zero_grad(self):
        raise Wrong("this library's optimisers have no zero_grad; call model.zero_grad()")

    def step(self):
        self.step_count += 1
        expect(all(p.grad is not None for p in self.parameters), "optimizer.step() found no "
               "gradients: it comes after loss.backward(), and nothing clears them in between")
        with torch.no_grad():
            for p in self.parameters:
                p -= self.lr * p.grad


def one_step_of_training(train_step):
    """it makes one step along the gradient of this batch"""
    inputs, targets = random_ids(9, 2, 6), random_ids(9, 2, 6, seed=1)
    model, reference = tiny_model(), tiny_model()
    loss = cross_entropy(reference(inputs), targets)
    grads = torch.autograd.grad(loss, list(reference.parameters()))
    optimizer = CountedSteps(model, 0.1)
    returned = train_step(model, optimizer, inputs, targets)
    expect_equal(optimizer.step_count, 1, "the number of steps taken")
    for p, old, grad in zip(model.parameters(), reference.parameters(), grads, strict=True):
        expect_close(p, old - 0.1 * grad, "a weight after the step", tolerance=1e-4)
    expect_close(returned, loss, "the loss that is returned", ask="a number, from before the step")


def nothing_is_left_of_the_step_before(train_step):
    """gradients do not add up over two steps"""
    inputs, targets = random_ids(9, 2, 6), random_ids(9, 2, 6, seed=1)
    model, reference = tiny_model(), tiny_model()
    for _ in range(2):
        train_step(model, CountedSteps(model, 0.1), inputs, targets)
        grads = torch.autograd.grad(cross_entropy(reference(inputs), targets),
                                    list(reference.parameters()))
        with torch.no_grad():
            for p, grad in zip(reference.parameters(), grads, strict=True):
                p -= 0.1 * grad
    for p, want in zip(model.parameters(), reference.parameters(), strict=True):
        expect_close(p, want, "a weight after two steps", tolerance=1e-3,
                     ask="backward adds to `.grad`: was it cleared before?")


def one_batch_is_learned_by_heart(train_step):
    """one batch, 60 times: the loss falls below 0.1"""
    model = tiny_model()
    inputs = torch.arange(8)[None]
    targets = (inputs * 5 + 2) % 9
    optimizer = AdamW(model.parameters(), 0.03)
    losses = [train_step(model, optimizer, inputs, targets) for _ in range(60)]
    expect(isinstance(losses[-1], float), "a float should be returned, loss.item(): a tensor keeps "
           "the whole graph alive")
    expect(losses[-1] < 0.1, f"the loss goes from {losses[0]:.2f} to {losses[-1]:.2f}; it should "
           "fall below 0.1")


# token_probs

CHANCES = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def probs_of(token_probs, **settings):
    return token_probs(CHANCES.log(), **settings)


def by_default_it_is_softmax(token_probs):
    """without settings it is softmax"""
    expect_close(probs_of(token_probs), CHANCES, "the chances", "row token")


def temperature_sharpens(token_probs):
    """temperature 1/2 squares the chances: 16, 9, 4 and 1 of 30"""
    expect_close(probs_of(token_probs, temperature=0.5), torch.tensor([[16, 9, 4, 1.0]]) / 30,
                 "the chances at temperature 0.5", "row token", ask="temperature divides the "
                 "logits")


def top_k_keeps_k(token_probs):
    """top_k=2 keeps 0.4 and 0.3, as 4/7 and 3/7"""
    expect_close(probs_of(token_probs, top_k=2), torch.tensor([[4, 3, 0, 0.0]]) / 7,
                 "the chances with top_k=2", "row token", ask="what is left is scaled to sum to 1")


def top_p_keeps_the_fewest_that_reach_p(token_probs):
    """top_p=0.6 keeps 0.4 and 0.3: 0.4 alone does not reach 0.6"""
    expect_close(probs_of(token_probs, top_p=0.6), torch.tensor([[4, 3, 0, 0.0]]) / 7,
                 "the chances with top_p=0.6", "row token", ask="the token that crosses p is kept")
    expect_close(probs_of(token_probs, top_p=0.1), torch.tensor([[1.0, 0, 0, 0]]),
                 "the chances with top_p=0.1", "row token", ask="at least one token is kept")


def top_p_comes_after_top_k(token_probs):
    """top_k=2 and top_p=0.55: of 4/7 and 3/7, the first alone reaches 0.55"""
    expect_close(probs_of(token_probs, top_k=2, top_p=0.55), torch.tensor([[1.0, 0, 0, 0]]),
                 "the chances with both", "row token", ask="top_p sees the chances that top_k has "
                                                           "kept, scaled to sum to 1")


def each_row_has_its_own_order(token_probs):
    """tokens keep their places, in each row of the batch"""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.4, 0.1]]).log()
    want = torch.tensor([[4, 3, 0, 0.0], [3, 0, 4, 0]]) / 7
    for name, value in (("top_k", 2), ("top_p", 0.6)):
        expect_close(token_probs(logits, **{name: value}), want, f"the chances with {name}={value}",
                     "row token", ask="after sorting, each chance goes back to its token")


# penalise_repetition


def what_was_there_is_less_likely(penalise_repetition):
    """with penalty 2, a logit of 4 becomes 2, and one of -4 becomes -8"""
    logits = torch.tensor([[4.0, -4, 1]])
    got = penalise_repetition(logits, torch.tensor([[0, 1]]), 2.0)
    expect_close(got, torch.tensor([[2.0, -8, 1]]), "the logit", "row token", ask="half of a "
                 "negative logit would be likelier")


def often_is_once(penalise_repetition):
    """a token that occurred three times is punished once"""
    got = penalise_repetition(torch.tensor([[4.0, 1]]), torch.tensor([[0, 0, 0]]), 2.0)
    expect_close(got, torch.tensor([[2.0, 1]]), "the logit", "row token")


def each_row_has_its_own_past(penalise_repetition):
    """a row is punished for its own tokens, and the logits that are passed in do not change"""
    logits = torch.tensor([[4.0, 4], [4.0, 4]])
    got = penalise_repetition(logits, torch.tensor([[0], [1]]), 2.0)
    expect_close(got, torch.tensor([[2.0, 4], [4.0, 2]]), "the logit", "row token")
    expect_close(logits, torch.full((2, 2), 4.0), "a logit that was passed", "row token",
                 ask="did you write into the argument?")


# pad_left


def padded(pad_left, prompts):
    result = pad_left(prompts)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two tensors should be returned, (tokens, key_mask)")
    return result


def prompts_end_together(pad_left):
    """[5, 2, 8] and [6] end in the same column"""
    prompts = [[5, 2, 8], [6]]
    tokens, _ = padded(pad_left, prompts)
    expect_close(tokens, torch.tensor([[5, 2, 8], [0, 0, 6]]), "tokens", "row pos",
                 ask="the padding stands on the left")
    expect(not tokens.is_floating_point(), f"tokens is {tokens.dtype}; ids are integers")
    expect(prompts == [[5, 2, 8], [6]], f"the prompts that were passed in are now {prompts}: pad "
           "copies of them")


def the_mask_is_true_for_real_tokens(pad_left):
    """key_mask is True for real tokens, also if a real token is 0"""
    _, key_mask = padded(pad_left, [[5, 2, 8], [0]])
    expect(isinstance(key_mask, torch.Tensor) and key_mask.dtype == torch.bool,
           "key_mask should be a tensor of booleans")
    expect_close(key_mask.int(), torch.tensor([[1, 1, 1], [0, 0, 1]]), "key_mask", "row pos",
                 ask="True for real tokens; 0 is an id like any other")


# extend


def steps_of(extend, *sizes, key_mask=None):
    """The results of three calls in a row, and the keys of all positions."""
    keys = random(2, sum(sizes), 2, 3)
    past = GrowingPast(8, key_mask)
    results = [extend(past, k, k + 1) for k in keys.split(sizes, dim=1)]
    if any(not isinstance(result, (tuple, list)) or len(result) != 3 for result in results):
        raise Wrong("three things should be returned, (keys, values, mask)")
    return results, keys


def the_first_call_gives_back_its_own(extend):
    """at the first call the keys are the new ones, and there is no mask"""
    results, keys = steps_of(extend, 3)
    expect_close(results[0][0], keys, "the keys", "batch pos head d_head")
    expect_close(results[0][1], keys + 1, "the values", "batch pos head d_head")
    expect(results[0][2] is None, "without a key_mask the mask should be None")


def later_calls_add_at_the_end(extend):
    """after 3, 1 and 2 positions, the keys are those of all 6, in order"""
    results, keys = steps_of(extend, 3, 1, 2)
    expect_close(results[1][0], keys[:, :4], "the keys after the second call",
                 "batch pos head d_head", ask="the old ones, kept in self.k, and then the new ones")
    expect_close(results[2][0], keys, "the keys after the third call", "batch pos head d_head",
                 ask="old ones first")
    expect_close(results[2][1], keys + 1, "the values after the third call",
                 "batch pos head d_head")


def the_mask_is_that_of_what_is_there(extend):
    """the mask covers the positions so far, not all n_ctx"""
    key_mask = torch.tensor([[False, True, True, True, True, True, True, True], [True] * 8])
    results, _ = steps_of(extend, 3, 1, key_mask=key_mask)
    for result, n_keys in zip(results, (3, 4), strict=True):
        expect_shape(result[2], (2, n_keys), f"the mask for {n_keys} keys", ask="the beginning of "
                     "self.key_mask, which itself stays as it is")
        expect(torch.equal(result[2], key_mask[:, :n_keys]), "the mask is not the beginning of "
                                                             "key_mask")


def decoding_gives_what_reading_gives(extend):
    """a model that decodes with it gives the logits of reading the whole text"""
    model, tokens = tiny_model(), random_ids(9, 2, 6)
    past = [GrowingPast(8)]
    with torch.no_grad():
        model.run_blocks(model.embed(tokens[:, :4]), past=past)
        last = model.embed(tokens[:, 4:], torch.tensor([4, 5]))
        logits = model.unembed(model.run_blocks(last, past=past))
        expect_close(logits, model(tokens)[:, 4:], "the logits of positions 4 and 5",
                     "batch pos d_vocab", ask="does the next call still have what this one kept?")


# continue_greedily


def the_likeliest_is_appended(continue_greedily):
    """one new token: the likeliest after the last position"""
    model, tokens = tiny_model(), random_ids(9, 2, 5)
    longer = continue_greedily(model, tokens, 1)
    want = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    expect_close(longer, want, "the text", "batch pos", ask="the prompt, and then the argmax of "
                 "the last position's logits")


def it_reads_what_it_wrote(continue_greedily):
    """three new tokens are each drawn given those before"""
    model, tokens = tiny_model(), random_ids(9, 2, 4)
    want = tokens
    for _ in range(3):
        want = torch.cat([want, model(want)[:, -1].argmax(-1, keepdim=True)], 1)
    expect_close(continue_greedily(model, tokens, 3), want, "the text", "batch pos")


def beyond_the_context_the_window_slides(continue_greedily):
    """a text longer than n_ctx is read from its last n_ctx tokens"""
    model, tokens = tiny_model(n_ctx=4), random_ids(9, 2, 4)
    want = tokens
    for _ in range(3):
        want = torch.cat([want, model(want[:, -4:])[:, -1].argmax(-1, keepdim=True)], 1)
    longer = continue_greedily(model, tokens, 3)
    expect_shape(longer, (2, 7), "the text", ask="all 4 tokens and 3 new ones, though the model "
                 "reads the last 4 only")
    expect_close(longer, want, "the text", "batch pos",
                 ask="which tokens does the model read once the context is full?")


EXERCISES = [
    Exercise(
        name="schedule", source="optim.schedule", minutes=15, difficulty=1, needed_for="training",
        task="Rise, then fall. You need not write the library's third shape, trapezoid.",
        checks=(it_falls_linearly, it_rises_over_the_warmup, a_cosine_is_at_a_half_halfway,
                it_ends_near_the_final_fraction),
        hints=("Two cases: step < warmup_steps, and after it.",
               "progress = (step - warmup_steps) / (max_steps - warmup_steps) runs from 0 to 1.",
               "remaining is 1 - progress, or (1 + cos(pi progress)) / 2; then final_fraction + "
               "(1 - final_fraction) * remaining."),
        mistakes=(
            Mistake("when the first step of the warmup has size 0", "(step + 1) / warmup_steps",
                    "step / warmup_steps"),
            Mistake("when the fall is counted from step 0, not from the end of the warmup",
                    "(step - warmup_steps) / (max_steps - warmup_steps)", "step / max_steps"),
            Mistake("with a whole cosine instead of half a one", "math.pi * progress",
                    "2 * math.pi * progress"),
            Mistake("with a quarter of a cosine: it should go from 0 to pi",
                    "(1 + math.cos(math.pi * progress)) / 2", "math.cos(math.pi * progress / 2)"),
            Mistake("when shape is not used: it always falls linearly", 'if shape == "cosine"',
                    "if False"),
            Mistake("when final_fraction is added on top", "(1 - final_fraction) * remaining",
                    "remaining"),
            Mistake("when final_fraction is not used",
                    "final_fraction + (1 - final_fraction) * remaining", "remaining"),
            Mistake("when it falls towards 0, and stops at final_fraction",
                    "final_fraction + (1 - final_fraction) * remaining",
                    "max(final_fraction, remaining)"),
            Mistake("when the last step has size 0", "/ (max_steps - warmup_steps)",
                    "/ (max_steps - warmup_steps - 1)"),
        )),
    Exercise(
        name="clip_gradients_", source="optim.clip_gradients_", minutes=10, difficulty=1,
        needed_for="training", task="One norm over everything.",
        checks=(large_gradients_are_scaled_together, small_gradients_are_left_alone,
                the_norm_before_is_returned),
        hints=("The joint norm is that of all gradients concatenated.",
               "The root of the sum of all squares.", "Where norm > most: grad.mul_(most / norm)."),
        mistakes=(
            Mistake("when each gradient is clipped alone",
                    "    if norm > most:\n        for grad in grads:\n"
                    "            grad.mul_(most / norm)\n",
                    "    for grad in grads:\n        if grad.norm() > most:\n"
                    "            grad.mul_(most / grad.norm())\n"),
            Mistake("when `grad = grad * …` makes a new tensor, and `.grad` does not change",
                    "grad.mul_(most / norm)", "grad = grad * most / norm"),
            Mistake("with the sum of the norms instead of the joint norm",
                    "sum(grad.pow(2).sum() for grad in grads).sqrt()",
                    "sum(grad.norm() for grad in grads)"),
            Mistake("when small gradients are scaled up too", "    if norm > most:\n",
                    "    if True:\n"),
            Mistake("when each number is clamped", "grad.mul_(most / norm)",
                    "grad.clamp_(-most, most)"),
            Mistake("with the norm after the clipping", "    return norm\n",
                    "    return norm.clamp(max=most)\n"),
            Mistake("without the root", ".sum() for grad in grads).sqrt()",
                    ".sum() for grad in grads)"),
        )),
    Exercise(
        name="adamw_step", source="optim.AdamW.step", minutes=25, difficulty=2,
        needed_for="training", task="One tensor after another; no torch.optim.",
        checks=(the_first_step_is_the_learning_rate, the_gradient_s_size_does_not_matter,
                the_share_scales_the_step, eps_stands_beside_the_root, without_decay_it_is_adam,
                it_equals_torch_s, the_share_scales_the_decay),
        hints=("Four lines for each parameter: m, v, decay, step. All in place (mul_, add_, sub_).",
               "m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2; both divided by "
               "1 - beta^t before they are used.",
               "w *= 1 - lr * decay for matrices; w -= lr * m' / (sqrt(v') + eps)."),
        mistakes=(
            Mistake("without the correction for averages that start at 0",
                    "m / (1 - beta1**self.step_count)", "m",
                    also=(("v / (1 - beta2**self.step_count)", "v"),)),
            Mistake("when only m is corrected for starting at 0",
                    "v / (1 - beta2**self.step_count)", "v"),
            Mistake("when the decay is added to the gradient (Adam with L2)",
                    "    for p, m, v in zip(self.parameters, self.m, self.v, strict=True):\n",
                    "    for p, m, v in zip(self.parameters, self.m, self.v, strict=True):\n"
                    "        grad = p.grad + (p.ndim >= 2) * self.weight_decay * p\n",
                    also=(("(1 - beta1) * p.grad", "(1 - beta1) * grad"),
                          ("(1 - beta2) * p.grad**2", "(1 - beta2) * grad**2"),
                          ("p.mul_(1 - lr * self.weight_decay)", "pass"))),
            Mistake("when `m = …` and `v = …` make new tensors, and the averages are not kept",
                    "m.mul_(beta1).add_(", "m = (beta1 * m).add_(",
                    also=(("v.mul_(beta2).add_(", "v = (beta2 * v).add_("),)),
            Mistake("when the corrected averages are kept: the correction is for one step alone",
                    "m / (1 - beta1**self.step_count)", "m.div_(1 - beta1**self.step_count)",
                    also=(("v / (1 - beta2**self.step_count)",
                           "v.div_(1 - beta2**self.step_count)"),)),
            Mistake("when eps stands under the root", "(v_corrected.sqrt() + self.eps)",
                    "(v_corrected + self.eps).sqrt()"),
            Mistake("without eps", "(v_corrected.sqrt() + self.eps)", "v_corrected.sqrt()"),
            Mistake("when step_count does not rise: 1 - beta**0 is 0",
                    "    self.step_count += 1\n", ""),
            Mistake("when step_count rises once for each parameter", "    self.step_count += 1\n",
                    "", also=(("        # The two averages\n", "        self.step_count += 1\n"),)),
            Mistake("when share does not reach the decay", "1 - lr * self.weight_decay",
                    "1 - self.lr * self.weight_decay"),
            Mistake("when vectors decay too", "if p.ndim >= 2:", "if p.ndim >= 1:"),
            Mistake("when the decay is not scaled by the learning rate",
                    "1 - lr * self.weight_decay", "1 - self.weight_decay"),
            Mistake("without the root of v", "v_corrected.sqrt()", "v_corrected"),
            Mistake("when v averages g instead of g squared", "p.grad**2", "p.grad.abs()"),
            Mistake("when the step goes up the gradient", "p.sub_(", "p.add_("),
            Mistake("when `p = p - …` makes a new tensor, and the parameter does not change",
                    "p.sub_(", "p = p - ("),
            Mistake("when share is not used", "lr = share * self.lr", "lr = self.lr"),
        )),
    Exercise(
        name="orthogonalise", source="optim.orthogonalise", minutes=20, difficulty=3,
        needed_for="Muon", task="Apply four rounds of an odd polynomial to one matrix.",
        checks=(singular_values_come_near_to_one, directions_stay, the_size_does_not_matter,
                the_argument_stays),
        hints=("X X^T X has the singular vectors of X, and its values cubed.",
               "Divide by X.norm() once, before the rounds, not in each.",
               "square = X @ X.T; X = a * X + b * square @ X + c * square @ square @ X."),
        mistakes=(
            Mistake("without the division by the norm", "    X = X / (X.norm() + 1e-7)\n", ""),
            Mistake("without the fifth power", " + c * square @ square @ X", ""),
            Mistake("when the square of X X^T squares each number: it should be a matrix product",
                    "c * square @ square @ X", "c * square**2 @ X"),
            Mistake("when X X^T is computed once, and not in each round",
                    "    for a, b, c in POLAR_EXPRESS_ROUNDS:\n        square = X @ X.T\n",
                    "    square = X @ X.T\n    for a, b, c in POLAR_EXPRESS_ROUNDS:\n"),
            Mistake("when every round takes the first a, b, c", "in POLAR_EXPRESS_ROUNDS:",
                    "in POLAR_EXPRESS_ROUNDS[:1] * 4:"),
            Mistake("without the last round", "in POLAR_EXPRESS_ROUNDS:",
                    "in POLAR_EXPRESS_ROUNDS[:-1]:"),
            Mistake("after the first round only", "in POLAR_EXPRESS_ROUNDS:",
                    "in POLAR_EXPRESS_ROUNDS[:1]:"),
            Mistake("when a tall matrix is not transposed back", "return X.T if is_tall else X",
                    "return X"),
            Mistake("with the rounds in the opposite order", "in POLAR_EXPRESS_ROUNDS:",
                    "in reversed(POLAR_EXPRESS_ROUNDS):"),
        )),
    Exercise(
        name="train_step", source=None, minutes=10, difficulty=1, needed_for="every training",
        task="Write the body of the training loop. The library's cross_entropy is imported.",
        checks=(one_step_of_training, nothing_is_left_of_the_step_before,
                one_batch_is_learned_by_heart),
        hints=("Forward, loss, backward, step. Gradients add up unless they are cleared.",
               "model.zero_grad() before backward.", "…and return loss.item()."),
        mistakes=(
            Mistake("when the gradients of the step before are not cleared",
                    "    model.zero_grad()\n", ""),
            Mistake("without the optimiser's step", "    optimizer.step()\n", ""),
            Mistake("when the gradients are cleared between backward and step",
                    "    model.zero_grad()\n", "",
                    also=(("    loss.backward()\n", "    loss.backward()\n    for p in "
                           "model.parameters():\n        p.grad.zero_()\n"),)),
            Mistake("when the targets are shifted once more: they are the next tokens already",
                    "cross_entropy(model(inputs), targets)",
                    "cross_entropy(model(inputs)[:, :-1], targets[:, 1:])"),
            Mistake("when the loss is returned with its whole graph", "loss.item()", "loss"),
            Mistake("with the loss after the step", "return loss.item()",
                    "return cross_entropy(model(inputs), targets).item()"),
        )),
    Exercise(
        name="token_probs", source="generate.token_probs", minutes=25, difficulty=2,
        needed_for="sampling", task="Temperature, then top_k, then top_p.",
        checks=(by_default_it_is_softmax, temperature_sharpens, top_k_keeps_k,
                top_p_keeps_the_fewest_that_reach_p, top_p_comes_after_top_k,
                each_row_has_its_own_order),
        hints=("Sort the probabilities, cut off the tail, scale, and scatter them back.",
               "top_p keeps a token if the probabilities before it sum to less than p.",
               "likelier = probs.cumsum(-1) - probs; zero where likelier >= top_p; "
               "torch.zeros_like(probs).scatter(-1, order, probs)."),
        mistakes=(
            Mistake("when the temperature multiplies the logits", "logits / temperature",
                    "logits * temperature"),
            Mistake("when top_p keeps too few: the token that crosses p is dropped",
                    "likelier >= top_p - 1e-6", "likelier + sorted_probs > top_p + 1e-6"),
            Mistake("when top_p drops the token that crosses p",
                    "likelier >= top_p - 1e-6",
                    "(likelier + sorted_probs > top_p + 1e-6) & (likelier > 0)"),
            Mistake("when top_p is not used", "if top_p is not None", "if False"),
            Mistake("when top_k is not used", "if top_k is not None", "if False"),
            Mistake("when top_p keeps one too many", "likelier >= top_p - 1e-6",
                    "likelier - sorted_probs.roll(1, -1) >= top_p - 1e-6"),
            Mistake("when the chances that top_k keeps are not scaled before top_p",
                    "        sorted_probs[:, top_k:] = 0\n"
                    "        sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)\n",
                    "        sorted_probs[:, top_k:] = 0\n",
                    also=(("    return torch.zeros_like(probs).scatter(-1, order, sorted_probs)",
                           "    sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)\n"
                           "    return torch.zeros_like(probs).scatter(-1, order, "
                           "sorted_probs)"),)),
            Mistake("when the remaining chances do not sum to 1",
                    "        sorted_probs[:, top_k:] = 0\n"
                    "        sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)\n",
                    "        sorted_probs[:, top_k:] = 0\n"),
            Mistake("when the sorted chances are not put back in place",
                    "torch.zeros_like(probs).scatter(-1, order, sorted_probs)", "sorted_probs"),
            Mistake("with gather instead of scatter",
                    "torch.zeros_like(probs).scatter(-1, order, sorted_probs)",
                    "sorted_probs.gather(-1, order)"),
        )),
    Exercise(
        name="penalise_repetition", source="generate.penalise_repetition", minutes=10, difficulty=1,
        needed_for="sampling", task="Mind the sign.",
        checks=(what_was_there_is_less_likely, often_is_once, each_row_has_its_own_past),
        hints=("Dividing a negative logit makes it larger.",
               "A boolean [batch, d_vocab] of the tokens that occurred: zeros(...).scatter(1, "
               "tokens, True).",
               "torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), "
               "logits)."),
        mistakes=(
            Mistake("when negative logits are divided too: they get likelier",
                    "torch.where(logits > 0, logits / penalty, logits * penalty)",
                    "logits / penalty"),
            Mistake("when a token is punished each time that it occurred",
                    "    punished = torch.where(logits > 0, logits / penalty, logits * penalty)\n",
                    "    times = torch.zeros_like(logits).scatter_add(\n"
                    "        1, tokens, torch.ones_like(tokens).to(logits))\n"
                    "    punished = torch.where(logits > 0, logits / penalty**times,\n"
                    "                           logits * penalty**times)\n"),
            Mistake("when the penalty is subtracted",
                    "torch.where(logits > 0, logits / penalty, logits * penalty)",
                    "logits - penalty"),
            Mistake("when every row is punished for all rows' tokens", ".scatter(1, tokens, True)",
                    ".scatter(1, tokens, True).any(0, keepdim=True)"),
            Mistake("when tokens that did not occur are punished", "torch.where(seen, punished, "
                                                                   "logits)",
                    "torch.where(seen, logits, punished)"),
        )),
    Exercise(
        name="pad_left", source="positions.pad_left", minutes=10, difficulty=1,
        needed_for="batches of prompts (chapters 8 to 12)", task="Only lists of lists need to "
                                                                 "work.",
        checks=(prompts_end_together, the_mask_is_true_for_real_tokens),
        hints=("A prompt of n ids begins at column longest - n.",
               "Two tensors of zeros, [rows, longest], of which each row's end is filled.",
               "tokens[row, longest - len(prompt):] = torch.tensor(prompt)."),
        mistakes=(
            Mistake("with the padding on the right",
                    "tokens[row, longest - len(prompt) :]", "tokens[row, : len(prompt)]",
                    also=(("key_mask[row, longest - len(prompt) :]",
                           "key_mask[row, : len(prompt)]"),)),
            Mistake("when the mask is True for padding", "return tokens, key_mask",
                    "return tokens, ~key_mask"),
            Mistake("when id 0 counts as padding", "return tokens, key_mask",
                    "return tokens, tokens != 0"),
        )),
    Exercise(
        name="extend", source="attention.GrowingPast.extend", minutes=15, difficulty=2,
        needed_for="decoding", task="Keep the keys and values of earlier positions while decoding.",
        checks=(the_first_call_gives_back_its_own, later_calls_add_at_the_end,
                the_mask_is_that_of_what_is_there, decoding_gives_what_reading_gives),
        hints=("Positions are axis 1.", "self.k is None at the first call; then torch.cat.",
               "The mask is self.key_mask[:, : number of keys], or None."),
        mistakes=(
            Mistake("when new keys come before the old ones", "torch.cat([self.k, k], 1)",
                    "torch.cat([k, self.k], 1)",
                    also=(("torch.cat([self.v, v], 1)", "torch.cat([v, self.v], 1)"),)),
            Mistake("when nothing is kept", "k if self.k is None else torch.cat([self.k, k], 1)",
                    "k", also=(("v if self.v is None else torch.cat([self.v, v], 1)", "v"),)),
            Mistake("when the joined keys and values are returned, and not kept in self",
                    "    self.k = k if self.k is None else torch.cat([self.k, k], 1)\n"
                    "    self.v = v if self.v is None else torch.cat([self.v, v], 1)\n"
                    "    n_keys = self.k.shape[1]\n",
                    "    keys = k if self.k is None else torch.cat([self.k, k], 1)\n"
                    "    values = v if self.v is None else torch.cat([self.v, v], 1)\n"
                    "    n_keys = keys.shape[1]\n",
                    also=(("return self.k, self.v, mask", "return keys, values, mask"),)),
            Mistake("when keys and values are exchanged", "return self.k, self.v, mask",
                    "return self.v, self.k, mask"),
            Mistake("when the mask covers the whole context", "self.key_mask[:, :n_keys]",
                    "self.key_mask"),
            Mistake("when the mask is that of the last positions", "self.key_mask[:, :n_keys]",
                    "self.key_mask[:, -n_keys:]"),
        )),
    Exercise(
        name="continue_greedily", source=None, minutes=15, difficulty=2, needed_for="sampling",
        task="Read, choose, append; without a cache.",
        checks=(the_likeliest_is_appended, it_reads_what_it_wrote,
                beyond_the_context_the_window_slides),
        hints=("Only the last position's logits predict a token that is not in the text yet.",
               "argmax(-1, keepdim=True) can be joined to tokens by torch.cat(…, 1).",
               "Read tokens[:, -n_ctx:] each time."),
        mistakes=(
            Mistake("when the first position's logits are read", "model(window)[:, -1]",
                    "model(window)[:, 0]"),
            Mistake("when the first n_ctx tokens are read, and not the last",
                    "tokens[:, -model.cfg.n_ctx :]", "tokens[:, : model.cfg.n_ctx]"),
            Mistake("when only the last token is read", "tokens[:, -model.cfg.n_ctx :]",
                    "tokens[:, -1:]"),
            Mistake("with the least likely token", "argmax", "argmin"),
            Mistake("without the prompt", "    return tokens\n", "    return tokens[:, -n_new:]\n"),
        )),
]

PREDICTIONS = [
    Prediction("One batch of 128 tokens is repeated 120 times. What is the loss on it at the end, "
               "in nats?",
               stated(6, "one batch, again and again: … nats, then {}"), "the chapter's block"),
    Prediction("What is the validation loss of the default run of train.py, in nats a character, "
               "if a uniform guess costs 4.17?",
               stated(6, "ended at a validation loss of {} nats a character"), "Expected"),
    Prediction("That run, at 1.57 on Shakespeare, is tuned on the built-in corpus for 300 steps "
               "with a new model's learning rates. What is its loss on Shakespeare then?",
               stated(6, "with a new model's rates | … | {} |"), "Fine-tuning"),
]
