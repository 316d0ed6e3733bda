"""The lens: its last row is the model's prediction, and tuning changes only the lens."""

import pytest
import torch
from helpers import WIDE, refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

import logit_lens as module
from logit_lens import TunedLens, fit_tuned_lens, logit_lens
from losses import kl_divergence
from optim import schedule
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"norm": "none"},
          {"positions": "none"}, {"unembed_bias": True}, {"n_layers": 0},
          {**WIDE, "d_vocab_out": 13}]


def cached(**changes):
    model = tiny_model(**changes)
    with torch.no_grad():
        return model, *model.run_with_cache(tiny_tokens())


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_last_row_is_the_prediction_of_the_model(changes):
    model, logits, cache = cached(**changes)
    for incl_mid in (False, True):
        result = logit_lens(model, cache, incl_mid)
        assert_close(result.logits[-1], logits)
        assert_close(result.kl[-1], torch.zeros(2, 7), atol=1e-6, rtol=0)
        assert result.labels[-1] == "final_post" and len(result.labels) == len(result.logits)


def test_each_row_is_the_unembedding_of_its_stream():
    model, logits, cache = cached()
    result = logit_lens(model, cache, incl_mid=True)
    names = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1)]
    with torch.no_grad():
        for row, name in enumerate(names):
            expected = model.unembed(cache[name])
            assert_close(result.logits[row], expected)
            assert_close(result.kl[row], kl_divergence(logits, expected))
            log_probs = expected.log_softmax(-1)
            assert_close(result.entropy[row], -(log_probs.exp() * log_probs).sum(-1))


def test_top_tokens_and_ranks_are_those_of_the_logits():
    model, _, cache = cached()
    whole, targets = logit_lens(model, cache), tiny_tokens(seed=5)
    result = logit_lens(model, cache, top_k=3, targets=targets)
    assert result.logits is None
    order = whole.logits.argsort(-1, descending=True)
    assert torch.equal(result.top_tokens, order[..., :3])
    assert_close(result.top_probs, whole.logits.softmax(-1).gather(-1, order[..., :3]))
    assert torch.equal(result.rank, (order == targets[..., None]).int().argmax(-1))
    first = logit_lens(model, cache, targets=targets[:, 0]).rank
    assert torch.equal(first, (order == targets[:, :1, None]).int().argmax(-1))


def test_some_positions_are_those_of_all_and_targets_may_be_of_the_whole_text():
    model, _, cache = cached()
    targets = tiny_tokens(seed=5)
    whole = logit_lens(model, cache, targets=targets)
    for pos, chosen in ((-1, [6]), (3, [3]), (slice(2, 5), [2, 3, 4]), ([6, 0], [6, 0]),
                        (None, list(range(7)))):
        for given in (targets, targets[:, chosen]):
            some = logit_lens(model, cache, pos=pos, targets=given)
            assert_close(some.logits, whole.logits[:, :, chosen])
            assert_close(some.kl, whole.kl[:, :, chosen])
            assert torch.equal(some.rank, whole.rank[:, :, chosen]), f"ranks at pos={pos}"


def test_a_target_whose_logit_is_nan_is_never_the_likeliest():
    model, _, cache = cached()
    with torch.no_grad():
        model.unembedding.W_U[:, 4] = float("nan")
    assert (logit_lens(model, cache, targets=4).rank > 0).all()


def test_a_few_logits_at_a_time_give_the_same(monkeypatch):
    model, _, cache = cached()
    whole = logit_lens(model, cache, targets=3)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    piecewise = logit_lens(model, cache, targets=3)
    for name in ("logits", "kl", "entropy", "rank"):
        assert_close(getattr(piecewise, name), getattr(whole, name))


def test_an_untrained_tuned_lens_is_the_logit_lens():
    for changes in SHAPES[:-1]:
        model, _, cache = cached(**changes)
        plain = logit_lens(model, cache, incl_mid=True)
        tuned = logit_lens(model, cache, incl_mid=True, lens=TunedLens(12, plain.labels[:-1]))
        assert_close(tuned.logits, plain.logits)


@pytest.mark.parametrize("changes", [{}, {"attn_only": True, "tie_embeddings": True}], ids=str)
def test_a_tuned_lens_is_nearer_to_the_end_at_every_row_before_it_on_unseen_text(changes):
    model = tiny_model(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    texts = torch.randint(11, (300, 9), generator=seeded_generator(3))
    lens = fit_tuned_lens(model, texts[:200], steps=60, lr=2e-2)
    with torch.no_grad():
        cache = model.run_with_cache(texts[200:])[1]
    plain = logit_lens(model, cache, incl_mid=True)
    tuned = logit_lens(model, cache, incl_mid=True, lens=lens)
    for label, kl, untuned in zip(tuned.labels[:-1], tuned.kl, plain.kl, strict=False):
        assert kl.mean() < untuned.mean(), f"{label}: {kl.mean()} nats, {untuned.mean()} untuned"
    assert_close(tuned.logits[-1], plain.logits[-1])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


def test_the_same_seed_fits_the_same_lens_and_another_one_another():
    lenses = [fit_tuned_lens(tiny_model(), tiny_tokens(30), steps=3, seed=seed)
              for seed in (0, 0, 1)]
    assert torch.equal(lenses[0].A, lenses[1].A) and not torch.equal(lenses[0].A, lenses[2].A)


def test_a_lens_is_fitted_without_dropout_for_callers_without_gradients_and_the_mode_stays():
    texts = torch.randint(11, (40, 9), generator=seeded_generator(3))
    expected = fit_tuned_lens(tiny_model(), texts, steps=5)
    model = tiny_model(dropout=0.5).train()
    with torch.no_grad():
        lens = fit_tuned_lens(model, texts, steps=5)
    assert torch.equal(lens.A, expected.A) and lens.A.abs().max() > 0
    assert model.training and all(part.training for part in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    model.unembedding.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_tuned_lens(model, texts)
    assert model.training


def test_each_row_of_a_lens_is_its_own_affine_map():
    lens, h = TunedLens(3, ["0_pre", "0_mid"]), torch.randn(2, 4, 3, generator=seeded_generator(2))
    with torch.no_grad():
        for weight in lens.parameters():
            weight.normal_(generator=seeded_generator(weight.ndim))
        for row, label in enumerate(lens.labels):
            assert_close(lens.translate(h, label), h + h @ lens.A[row] + lens.b[row])
        assert torch.equal(lens.translate(h, "final_post"), h)


def test_fitting_a_lens_equals_the_naive_loop():
    model, texts = tiny_model(dtype=torch.float64), tiny_tokens(batch=30, pos=9)
    lens = fit_tuned_lens(model, texts, steps=12, batch_size=5, lr=0.01)
    naive = TunedLens(12, lens.labels).double()
    optimizer, draw = torch.optim.Adam(naive.parameters(), lr=0.01), seeded_generator(0)
    with torch.no_grad():
        caches = [model.run_with_cache(texts[torch.randint(30, (5,), generator=draw)])
                  for _ in range(12)]
    for step, (logits, cache) in enumerate(caches):
        optimizer.param_groups[0]["lr"] = 0.01 * schedule(step, 12, warmup_steps=10)
        optimizer.zero_grad()
        streams = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1)]
        loss = sum(torch.nn.functional.kl_div(
            model.unembed(naive.translate(cache[name], label)).log_softmax(-1),
            logits.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
            for name, label in zip(streams, lens.labels, strict=True))
        loss.backward(inputs=list(naive.parameters()))
        optimizer.step()
    assert_close(lens.A, naive.A)
    assert_close(lens.b, naive.b)


def test_a_lens_comes_back_from_its_file(tmp_path):
    lens = TunedLens(12, ["0_pre", "0_mid"])
    with torch.no_grad():
        lens.A.normal_(generator=seeded_generator(0))
        lens.b.normal_(generator=seeded_generator(1))
    lens.save(tmp_path / "lens.pt")
    again = TunedLens.load(tmp_path / "lens.pt")
    assert torch.equal(lens.A, again.A) and torch.equal(lens.b, again.b)
    assert lens.labels == again.labels
    lens.double().save(tmp_path / "lens.pt")
    again = TunedLens.load(tmp_path / "lens.pt")
    assert again.A.dtype == again.b.dtype == torch.float64 and torch.equal(lens.A, again.A)
    (tmp_path / "other.pt").write_text("no")
    with pytest.raises(UserError, match="not a tuned lens"):
        TunedLens.load(tmp_path / "other.pt")


def test_arguments_that_a_lens_cannot_read_are_refused():
    model, _, cache = cached()
    for case, told in (
        ({"top_k": 12}, "top_k=12"),
        ({"top_k": 0}, "top_k=0"),
        ({"pos": 7}, "pos=7"),
        ({"targets": "a"}, "text"),
        ({"targets": tiny_tokens() + 99}, "99"),
        ({"targets": tiny_tokens(3)}, "[3, 7]"),
        ({"targets": tiny_tokens(2, 2), "pos": [1, 2, 3]}, "[2, 2]"),
        ({"lens": TunedLens(12, ["0_pre"])}, "1_pre"),
        ({"lens": TunedLens(9, ["0_pre", "1_pre"])}, "width 9"),
    ):
        message = refusal(lambda case=case: logit_lens(model, cache, **case), case)
        assert told in message, f"{case} is refused as {message}"


def test_texts_that_cannot_be_fitted_are_refused():
    model, texts = tiny_model(), tiny_tokens()
    for case, call, told in (
        ("no layers", lambda: fit_tuned_lens(tiny_model(n_layers=0), texts), "n_layers=0"),
        ("no steps", lambda: fit_tuned_lens(model, texts, steps=0), "steps=0"),
        ("no texts", lambda: fit_tuned_lens(model, texts[:0]), "n_texts=0"),
        ("a NaN", lambda: fit_tuned_lens(model, texts, steps=3, lr=float("nan")), "lr=nan"),
    ):
        message = refusal(call, case)
        assert told in message, f"{case} is refused as {message}"


def test_the_likeliest_words_are_those_of_the_likeliest_ids_even_of_ones_that_stand_for_none():
    model = tiny_model()
    tokenizer = CharTokenizer().fit("abcdef")  # of a vocabulary of 11
    _, cache = model.run_with_cache(tiny_tokens(batch=3, pos=7))
    result = logit_lens(model, cache)
    for batch in range(3):
        words = result.likeliest_words(tokenizer, batch)
        ids = result.logits[:, batch].argmax(-1).tolist()
        assert words == [["abcdef"[i] if i < 6 else f"<id {i}>" for i in row] for row in ids]
        assert words == logit_lens(model, cache, top_k=2).likeliest_words(tokenizer, batch)
    assert any("<id" in word for row in words for word in row)


def test_a_lens_with_a_flipped_bit_and_other_files_are_refused(tmp_path):
    path = tmp_path / "lens.pt"
    lens = TunedLens(4, ["0_pre", "1_pre"])
    with torch.no_grad():
        lens.A.normal_()
    lens.save(path)
    assert torch.equal(TunedLens.load(path).A, lens.A)

    raw = bytearray(path.read_bytes())
    raw[raw.find(lens.A.detach().numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(raw)
    assert "checksum" in refusal(lambda: TunedLens.load(path))
    for state in (3, {}, {"A": 1, "b": 2, "labels": 3},
                  {"A": torch.zeros(2, 4, 4), "b": torch.zeros(2, 4), "labels": [1, 2]},
                  {"A": torch.zeros(2, 4, 3), "b": torch.zeros(2, 4), "labels": ["a", "b"]},
                  {"A": torch.zeros(1, 4, 4), "b": torch.zeros(2, 4), "labels": ["a", "b"]}):
        torch.save(state, path)
        assert "not a tuned lens" in refusal(lambda: TunedLens.load(path), state)
    refusal(lambda: TunedLens.load(tmp_path), "a folder")
    refusal(lambda: TunedLens.load("/dev/zero"), "a device")
