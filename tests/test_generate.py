"""Sampling: the distribution that is drawn from, and that the draws follow it."""

import pytest
import torch
from helpers import TINY, tiny_model, tiny_tokens
from test_checkpoint import TOKENIZER, save_run

from config import GenerateConfig, SamplingConfig
from generate import generate, generate_text, main, token_probs
from utils import seeded_generator

N_CTX = TINY["n_ctx"]


def some_logits(batch=20, d_vocab=11, seed=3):
    return 2 * torch.randn(batch, d_vocab, generator=seeded_generator(seed))


def drawn(model, prompts, n, *, stop_ids=(), cached=True, **how):
    """The n tokens that are added to each row, [batch, n], sliding where they do not fit."""
    cfg = SamplingConfig(**{"max_new_tokens": n, "temperature": 1.0, "sliding": True} | how)
    return torch.cat(list(generate(model, prompts, cfg, stop_ids=stop_ids, cached=cached)), 1)


# The distribution


def assert_probs(logits_of, wanted, **how):
    """token_probs of log(logits_of) are `wanted`, hand-computed."""
    probs = token_probs(torch.tensor([logits_of]).log(), **how)
    torch.testing.assert_close(probs.float(), torch.tensor([wanted]).float())


def test_probabilities_by_hand():
    p = [0.2, 0.4, 0.1, 0.3]
    assert_probs(p, p)
    assert_probs(p, [4 / 30, 16 / 30, 1 / 30, 9 / 30], temperature=0.5)  # squares
    assert_probs(p, [0, 4 / 7, 0, 3 / 7], top_k=2)
    assert_probs(p, [2 / 9, 4 / 9, 0, 3 / 9], top_p=0.8)  # 0.4 + 0.3 is not enough
    assert_probs(p, [0, 1, 0, 0], top_p=0.01)
    assert_probs(p, [0, 16 / 25, 0, 9 / 25], temperature=0.5, top_k=2)
    assert_probs(p, [0, 4 / 7, 0, 3 / 7], top_k=3, top_p=0.7)  # of 4/9 + 3/9, not of 0.4 + 0.3


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_the_temperature_divides_the_logits(temperature):
    logits = some_logits()
    probs = token_probs(logits, temperature)
    torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1))


@pytest.mark.parametrize("k", range(1, 13))
def test_top_k_keeps_the_k_likeliest_in_proportion(k):
    logits = some_logits()
    for row, probs in zip(logits.softmax(-1), token_probs(logits, top_k=k), strict=True):
        keep = sorted(range(11), key=lambda i: -row[i])[:k]
        wanted = torch.zeros(11)
        wanted[keep] = row[keep] / row[keep].sum()
        torch.testing.assert_close(probs.float(), wanted)


def test_of_equal_tokens_the_first_is_kept():
    probs = token_probs(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), top_k=2)[0]
    assert (probs > 0).tolist() == [True, True, False, False]
    assert token_probs(torch.zeros(1, 10), top_k=1).tolist() == [[1.0] + [0.0] * 9]


def test_a_temperature_near_zero_is_greedy_and_not_nan():
    assert token_probs(torch.tensor([[1.0, 3.0, 2.0]]), 1e-50).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.77, 0.95, 0.999])
def test_top_p_keeps_the_fewest_tokens_whose_sum_reaches_p(p):
    logits = some_logits()
    for row, probs in zip(logits.softmax(-1), token_probs(logits, top_p=p), strict=True):
        keep, total = [], 0.0
        for i in sorted(range(11), key=lambda i: -row[i]):
            if total < p:
                keep.append(i)
                total += row[i].item()
        wanted = torch.zeros(11)
        wanted[keep] = row[keep] / total
        torch.testing.assert_close(probs.float(), wanted)


def test_top_p_of_equal_tokens_keeps_just_enough_of_them():
    assert token_probs(torch.zeros(1, 8), top_p=0.5)[0].tolist() == [0.25] * 4 + [0] * 4
    kept = token_probs(torch.zeros(1, 10), top_p=0.6)[0] > 0  # ten tenths are not exactly one
    assert kept.sum() == 6


def test_a_top_p_of_one_keeps_every_token_of_a_large_vocabulary():
    logits = some_logits(batch=1, d_vocab=50_257)
    torch.testing.assert_close(token_probs(logits, top_p=1.0), logits.double().softmax(-1))


def test_limits_that_leave_everything_change_nothing():
    logits = some_logits()
    torch.testing.assert_close(token_probs(logits, top_k=99, top_p=1.0),
                               logits.double().softmax(-1))


@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.9},
                                 {"temperature": 1e-3}, {"temperature": 1e3, "top_p": 1e-6}])
def test_the_probabilities_of_each_row_sum_to_one(how):
    torch.testing.assert_close(token_probs(some_logits(), **how).sum(-1), torch.ones(20).double())


# The draws


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 4},
                                 {"temperature": 3.0, "top_p": 0.7}])
def test_tokens_come_as_often_as_they_are_likely(how):
    model, n = tiny_model(), 20_000
    tokens = tiny_tokens(batch=1)
    probs = token_probs(model(tokens)[:, -1], **how)[0].double()
    counts = drawn(model, tokens.expand(n, -1), 1, **how).flatten().bincount(minlength=11)
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 5 * sigma).all()
    assert (sigma > 0).sum() >= 2


def test_generating_equals_the_naive_loop():
    model, tokens = tiny_model(), tiny_tokens(batch=3, pos=4)
    generator, rows = seeded_generator(5), tokens
    for _ in range(2 * N_CTX):  # far beyond the context
        probs = (model(rows[:, -N_CTX:])[:, -1].double() / 0.9).softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probs, 1, generator=generator)], 1)
    assert torch.equal(drawn(model, tokens, 2 * N_CTX, seed=5, temperature=0.9), rows[:, 4:])


def test_greedy_takes_the_likeliest_and_leaves_nothing_to_chance():
    model, tokens = tiny_model(), tiny_tokens()
    greedy = drawn(model, tokens, 12, greedy=True)
    assert torch.equal(greedy, drawn(model, tokens, 12, seed=9, top_k=1, temperature=5.0))
    rows = torch.cat([tokens, greedy], 1)
    for end in range(tokens.shape[1], rows.shape[1]):
        logits = model(rows[:, max(0, end - N_CTX) : end])
        assert torch.equal(rows[:, end], logits[:, -1].argmax(-1))


def test_the_rows_of_a_batch_go_on_apart():
    model, tokens = tiny_model(), tiny_tokens(batch=4)
    together = drawn(model, tokens, 12, top_k=1)
    alone = [drawn(model, row[None], 12, top_k=1) for row in tokens]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(map(tuple, together.tolist()))) > 1


def test_what_lies_further_back_than_the_context_is_forgotten():
    model, tokens = tiny_model(), tiny_tokens(pos=3 * N_CTX)
    assert torch.equal(drawn(model, tokens, 12), drawn(model, tokens[:, -N_CTX:], 12))
    assert not torch.equal(drawn(model, tokens, 12), drawn(model, tokens[:, -2:], 12))


def test_generating_builds_no_graph_and_leaves_the_caller_s_mode_and_prompt_alone():
    model, tokens, graphs = tiny_model(), tiny_tokens(), []
    before = tokens.clone()
    with model.hooks([("hook_embed", lambda resid, hook: graphs.append(resid.requires_grad))]):
        for _ in generate(model, tokens, SamplingConfig(max_new_tokens=3, sliding=True)):
            assert torch.is_grad_enabled()
    assert graphs == [False] * 3
    assert torch.equal(tokens, before)


def test_no_new_tokens_are_none():
    assert not list(generate(tiny_model(), tiny_tokens(), SamplingConfig(max_new_tokens=0)))


def text_of(model, seed=0, n=40):
    cfg = GenerateConfig(prompt="bad cab", max_new_tokens=n, seed=seed, sliding=True)
    return "".join(generate_text(model, TOKENIZER, cfg))


def test_the_seed_decides_the_text():
    model = tiny_model()
    assert text_of(model) == text_of(model)
    assert text_of(model) != text_of(model, seed=1)
    assert text_of(model).startswith(text_of(model, n=7)) and len(text_of(model)) == 40


# The program


def test_the_program_prints_the_prompt_and_as_many_characters_as_asked(tmp_path, capsys):
    model, _ = save_run(tmp_path / "mine")
    save_run(tmp_path / "newer", seed=2)
    flags = ["--out_dir", str(tmp_path), "--prompt", "bad cab", "--max_new_tokens", "40",
             "--sliding"]
    main([*flags, "--run_name", "mine", "--temperature", "0.8", "--device", "cpu"])
    assert capsys.readouterr().out == "bad cab" + text_of(model) + "\n"
    main([*flags, "--run_name", str(tmp_path / "mine"), "--seed", "1"])
    assert capsys.readouterr().out == "bad cab" + text_of(model, seed=1) + "\n"
    main(flags)
    assert capsys.readouterr().out == "bad cab" + text_of(tiny_model(2)) + "\n"


def test_the_program_s_sampling_flags_act(tmp_path, capsys):
    model, _ = save_run(tmp_path / "mine")
    main(["--out_dir", str(tmp_path), "--prompt", "a", "--max_new_tokens", "30", "--sliding",
          "--top_k", "1"])
    start = torch.tensor([TOKENIZER.encode("a")])
    greedy = TOKENIZER.decode(drawn(model, start, 30, top_k=1)[0])
    assert capsys.readouterr().out == f"a{greedy}\n"
    main(["--out_dir", str(tmp_path), "--prompt", "a", "--max_new_tokens", "30", "--sliding",
          "--top_p", "1e-9", "--temperature", "3"])
    assert capsys.readouterr().out == f"a{greedy}\n"
