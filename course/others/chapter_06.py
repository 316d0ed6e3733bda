"""Other right solutions of the exercises of chapter 6."""

import math

import torch
import torch.nn.functional as F

from optim import POLAR_EXPRESS_ROUNDS


def schedule_as_interpolation(step, max_steps, warmup_steps=0, *, shape="linear",
                              final_fraction=0.0):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (max_steps - step) / (max_steps - warmup_steps)
    if shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return final_fraction * (1 - left) + left


def clip_gradients__as_torch(parameters, most):
    return torch.nn.utils.clip_grad_norm_(list(parameters), most)


def clip_gradients__as_one_vector(parameters, most):
    with_grad = [p for p in parameters if p.grad is not None]
    norm = torch.cat([p.grad.flatten() for p in with_grad]).norm()
    scale = min(1.0, most / (norm.item() + 1e-6))
    for p in with_grad:
        p.grad = p.grad * scale
    return norm


@torch.no_grad()
def adamw_step_as_not_in_place(self, share=1.0):
    beta1, beta2 = self.betas
    lr = self.lr * share
    self.step_count = self.step_count + 1
    for i, p in enumerate(self.parameters):
        g = p.grad
        self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
        self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
        m_hat = self.m[i] / (1 - beta1**self.step_count)
        v_hat = self.v[i] / (1 - beta2**self.step_count)
        decay = lr * self.weight_decay * p if p.ndim > 1 else 0.0
        p -= decay + lr * m_hat / (torch.sqrt(v_hat) + self.eps)


@torch.no_grad()
def adamw_step_as_one_update(self, share=1.0):
    self.step_count += 1
    beta1, beta2 = self.betas
    for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
        m.lerp_(p.grad, 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        root = (v / (1 - beta2**self.step_count)).sqrt() + self.eps
        update = m / (1 - beta1**self.step_count) / root
        if p.ndim >= 2:
            update = update + self.weight_decay * p
        p -= share * self.lr * update


def orthogonalise_as_decomposition(matrix):
    # the same polynomials, on the singular values themselves
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S = S / (S.norm() + 1e-7)
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag(S) @ Vh


def orthogonalise_as_factored(matrix):
    X = matrix / (matrix.norm() + 1e-7)
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        square = X.T @ X  # from the other side: right, and dearer for a wide matrix
        X = X @ (a * torch.eye(len(square)) + b * square + c * square @ square)
    return X


def train_step_as_torch(model, optimizer, inputs, targets):
    for p in model.parameters():
        p.grad = None
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def token_probs_as_masked_logits(logits, temperature=1.0, top_k=None, top_p=None):
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        descending, order = logits.sort(descending=True)
        before = descending.softmax(-1).cumsum(-1) - descending.softmax(-1)
        drop = (before >= top_p - 1e-6).scatter(-1, order, before >= top_p - 1e-6)
        logits = logits.masked_fill(drop, -math.inf)
    return logits.softmax(-1)


def token_probs_as_shifted(logits, temperature=1.0, top_k=None, top_p=None):
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        descending, order = logits.sort(descending=True)
        remove = descending.softmax(-1).cumsum(-1) > top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -math.inf)
    return logits.softmax(-1)


def token_probs_as_loop(logits, temperature=1.0, top_k=None, top_p=None):
    rows = []
    for row in (logits / temperature).softmax(-1):
        order = row.argsort(descending=True).tolist()[:top_k]
        total = sum(row[i].item() for i in order)
        kept = []
        reached = 0.0
        for i in order:
            kept.append(i)
            reached += row[i].item() / total
            if top_p is not None and reached >= top_p - 1e-6:
                break
        probs = torch.zeros_like(row)
        probs[kept] = row[kept] / row[kept].sum()
        rows.append(probs)
    return torch.stack(rows)


def penalise_repetition_as_loop(logits, tokens, penalty):
    logits = logits.clone()
    for row in range(len(logits)):
        for token in set(tokens[row].tolist()):
            if logits[row, token] > 0:
                logits[row, token] /= penalty
            else:
                logits[row, token] *= penalty
    return logits


def penalise_repetition_as_gather(logits, tokens, penalty):
    seen = logits.gather(1, tokens)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits.scatter(1, tokens, seen)


def pad_left_as_lists(prompts):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return tokens, torch.arange(longest).flip(0) < lengths[:, None]


def extend_as_filled(self, k, v):
    if self.k is None:
        self.k = k.new_zeros(k.shape[0], self.n_ctx, *k.shape[2:])
        self.v = torch.zeros_like(self.k)
    end = self.length + k.shape[1]
    self.k[:, self.length : end] = k
    self.v[:, self.length : end] = v
    self.length = end
    return self.k[:, :end], self.v[:, :end], (
        self.key_mask[:, :end] if self.key_mask is not None else None)


def continue_greedily_as_list(model, tokens, n_new):
    rows = tokens.tolist()
    with torch.no_grad():
        for _ in range(n_new):
            window = torch.tensor([row[-model.cfg.n_ctx :] for row in rows])
            for row, best in zip(rows, model(window)[:, -1].argmax(1).tolist(), strict=True):
                row.append(best)
    return torch.tensor(rows)
