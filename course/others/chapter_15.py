"""Other right solutions of the exercises of chapter 15."""

import math

import torch


def addition_table_as_product(p):
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return pairs, pairs.sum(1) % p


def fourier_basis_as_outer(p):
    K = (p - 1) // 2
    angle = 2 * math.pi / p * torch.outer(torch.arange(1, K + 1).double(), torch.arange(p).double())
    waves = torch.stack([angle.cos(), angle.sin()], 1).reshape(2 * K, p)
    basis = torch.cat([torch.ones(1, p, dtype=torch.float64), waves])
    return basis / basis.norm(dim=1, keepdim=True)


def clock_logits_as_products(p, frequencies):
    # cos(x - y) = cos x cos y + sin x sin y
    k = torch.tensor(frequencies)[:, None] * 2 * math.pi / p
    n = torch.arange(p)
    total = n[:, None] + n
    x = k[..., None] * total
    return (torch.einsum("kab,kc->abc", x.cos(), (k * n).cos())
            + torch.einsum("kab,kc->abc", x.sin(), (k * n).sin()))


def frequency_shares_as_fft(values):
    spectrum = torch.fft.rfft(values.double(), dim=0)[1:]
    energy = spectrum.abs().pow(2).sum(1)
    return energy / energy.sum()


def keep_sum_waves_as_loops(logits, frequencies):
    p = len(logits)
    by_sum = torch.stack([
        torch.stack([logits[a, (s - a) % p] for a in range(p)]).mean(0) for s in range(p)])
    basis = fourier_basis_as_outer(p)
    kept = by_sum.mean(0).expand(p, -1).clone()
    for k in frequencies:
        for wave in (basis[2 * k - 1], basis[2 * k]):
            kept = kept + wave[:, None] * (wave @ by_sum)
    n = torch.arange(p)
    return kept[(n[:, None] + n) % p]


def delay_of_as_lists(steps, train, test, level):
    known = [step for step, value in zip(steps, test, strict=True) if value >= level]
    fitted = [step for step, value in zip(steps, train, strict=True) if value >= level]
    return known[0] / fitted[0] if known else float("inf")


def distance_to_bigrams_as_kl_div(logits, tokens, table):
    found = torch.nn.functional.kl_div(logits.log_softmax(-1), table[tokens], log_target=True,
                                       reduction="none")
    return found.sum(-1).mean()


def distance_to_bigrams_as_cross_entropies(logits, tokens, table):
    total = 0.0
    for row, text in zip(logits, tokens, strict=True):
        for scores, token in zip(row, text, strict=True):
            p = table[token].exp()
            total += (p @ table[token] - p @ scores.log_softmax(0)).item()
    return total / tokens.numel()


def ability_step_as_a_list(steps, above, by_trigrams):
    known = [step for step, nats in zip(steps, above, strict=True) if 2 * nats < by_trigrams]
    return min(known, default=float("inf"))
