"""Optimisers: AdamW and Muon, with gradient clipping and a learning-rate schedule.

Both optimisers are used the same way: `step(share)` moves the weights by `share` of the full
learning rate, so one schedule controls all of them.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: losses.py, model.py
Next: checkpoint.py
Source: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar
Express: its polynomials); Pascanu et al. 2013 (clipping)
"""

import math
from fnmatch import fnmatchcase

import torch

from utils import UserError, suggest_closest

# (a, b, c) of each round of `orthogonalise`
POLAR_EXPRESS_ROUNDS = (
    (8.38367, -24.76591, 18.35708),
    (4.04347, -3.01144, 0.56952),
    (3.5064, -2.62726, 0.52579),
    (2.49121, -1.8352, 0.43694),
)


class AdamW:
    """Adam with decoupled weight decay. A step:

        m = beta1 m + (1 - beta1) g              # where the gradient points, on average
        v = beta2 v + (1 - beta2) g^2            # how large it is, on average
        w = w - lr * decay * w                   # decoupled: not through the gradient
        w = w - lr * m' / (sqrt(v') + eps)
        # m' = m / (1 - beta1^t), v' = v / (1 - beta2^t): both start at zero

    Each weight moves by about lr a step, whatever the size of its gradient. Only matrices decay.
    Shrinking a bias or a LayerNorm weight would change what the network computes, because no other
    weight can compensate.

    parameters: the tensors to learn. `state_dict` keeps their order.
    """

    def __init__(self, parameters, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.matrices = [p for p in self.parameters if p.ndim >= 2]
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.step_count = 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, share=1.0):
        """Updates every parameter once from its `.grad`, by `share` of the learning rate.

        The operations run on lists of tensors (`torch._foreach_*`, as in torch's own optimisers):
        one call for all parameters instead of one for each.
        """
        grads = gradients_of(self.parameters)
        lr = share * self.lr
        beta1, beta2 = self.betas
        self.step_count += 1

        # Update the two averages
        torch._foreach_lerp_(self.m, grads, 1 - beta1)
        torch._foreach_mul_(self.v, beta2)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - beta2)

        # Weight decay
        if self.matrices:
            torch._foreach_mul_(self.matrices, 1 - lr * self.weight_decay)

        # The step along
        # m' / (sqrt(v') + eps) = (root / (1 - beta1^t)) m / (sqrt(v) + eps root):
        # this way only two numbers are corrected
        root = math.sqrt(1 - beta2**self.step_count)
        size = torch._foreach_sqrt(self.v)
        torch._foreach_add_(size, self.eps * root)
        step_size = lr * root / (1 - beta1**self.step_count)
        torch._foreach_addcdiv_(self.parameters, self.m, size, -step_size)

    def state_dict(self):
        """What a resumed run needs: the two averages, and the number of steps they cover."""
        return {"m": self.m, "v": self.v, "step_count": self.step_count}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restores the state_dict of an optimiser with the same parameters."""
        torch._foreach_copy_(self.m, state["m"])
        torch._foreach_copy_(self.v, state["v"])
        self.step_count = state["step_count"]


def gradients_of(parameters):
    """The gradient of each parameter; zeros for parameters that the loss does not depend on."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def orthogonalise(matrices):
    """Approximately the orthogonal matrix U V^T nearest to each matrix U S V^T [..., rows, cols].

    An odd polynomial of a matrix acts only on its singular values:
        a X + b (X X^T) X + c (X X^T)^2 X  =  U (a S + b S^3 + c S^5) V^T.
    Four rounds (POLAR_EXPRESS_ROUNDS) bring all singular values close to 1. Among all such
    polynomials, each round uses the one that stays closest to 1 on the interval left by the round
    before (Amsel et al. 2025). From [0.003, 1] the singular values move into [0.025, 1.975], then
    [0.10, 1.90], [0.35, 1.65], and finally [0.80, 1.20]. The smallest ones grow about 300 times.
    Everything is matrix products, which take a fraction of the time of a decomposition.
    """
    # Make X X^T the smaller of the two squares, and all singular values at most 1.
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if is_tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)

    if X.shape[-1] > 2 * X.shape[-2]:  # wide: the rounds are cheaper on the square
        X = inverse_square_root(X @ X.mT) @ X
    else:
        for a, b, c in POLAR_EXPRESS_ROUNDS:
            square = X @ X.mT
            X = ((square @ square).mul_(c).add_(square, alpha=b) @ X).add_(X, alpha=a)
    return X.mT if is_tall else X


def inverse_square_root(square):
    """Approximately (X X^T)^(-1/2), from the square X X^T [..., n, n]: the rounds as one factor.

    A round multiplies X by the factor a + b X X^T + c (X X^T)^2. It therefore multiplies X X^T by
    the same factor from both sides.
    """
    factor = None
    product = None
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        if factor is not None:
            square = factor @ square @ factor  # the square after the previous round
        factor = (square @ square).mul_(c).add_(square, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
    return product


class Muon:
    """Muon: momentum, orthogonalised before each step; for the blocks' matrices only.

    A step:

        m = beta m + g
        W = W - lr * decay * W
        W = W - lr * sqrt(max(1, d_out / d_in)) * orthogonalise(g + beta m)

    Why: consider all steps D whose largest singular value is at most 1, so that no input moves by
    more than its own length. To first order, the one that lowers the loss most is the orthogonal
    factor of the gradient: max <G, D> is the sum of G's singular values, reached at D = U V^T. A
    plain gradient step follows the few large singular values and hardly moves along the rest. Muon
    is steepest descent under the spectral norm, as sign descent (roughly Adam) is under the maximum
    norm.

    It is not used for embeddings, whose rows are read one at a time, or for vectors, which have no
    singular directions: AdamW learns those.

    parameters: matrices [d_in, d_out]. parts: for each, the number of matrices that lie side by
    side in it (3 for W_QKV: queries, keys and values are orthogonalised separately).
    """

    def __init__(self, parameters, lr, *, parts=None, momentum=0.95, weight_decay=0.0):
        self.parameters = list(parameters)
        self.parts = list(parts) if parts else [1] * len(self.parameters)
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.m = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, share=1.0):
        """Updates every matrix once, by `share` of the learning rate."""
        lr = share * self.lr
        grads = gradients_of(self.parameters)

        torch._foreach_mul_(self.m, self.momentum)
        torch._foreach_add_(self.m, grads)
        ahead = torch._foreach_add(grads, self.m, alpha=self.momentum)  # Nesterov momentum

        torch._foreach_mul_(self.parameters, 1 - lr * self.weight_decay)
        torch._foreach_add_(self.parameters, self.directions(ahead), alpha=-lr)

    def directions(self, momenta):
        """The orthogonalised step of each parameter; equal shapes are batched."""
        # Split matrices that lie side by side, and group them by shape.
        pieces = [list(m.chunk(n, dim=1)) for m, n in zip(momenta, self.parts, strict=True)]
        places_of = {}  # {shape: [(parameter, piece), …]}
        for i, row in enumerate(pieces):
            for j, piece in enumerate(row):
                places_of.setdefault(piece.shape, []).append((i, j))

        # Orthogonalise all matrices of one shape at once, and put each back in its place.
        for (d_in, d_out), places in places_of.items():
            scale = math.sqrt(max(1.0, d_out / d_in))
            steps = scale * orthogonalise(torch.stack([pieces[i][j] for i, j in places]))
            for (i, j), step in zip(places, steps, strict=True):
                pieces[i][j] = step
        return [row[0] if len(row) == 1 else torch.cat(row, dim=1) for row in pieces]

    def state_dict(self):
        """What a resumed run needs: the momenta."""
        return {"m": self.m}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restores the state_dict of an optimiser with the same parameters."""
        torch._foreach_copy_(self.m, state["m"])


def freeze_(model, patterns):
    """Keeps the parameters whose names match a pattern from learning, and returns their names.

    patterns: such as "blocks.0.*", where * stands for any characters. It sets requires_grad to
    False: no gradient is computed for these parameters, and `make_optimizers` leaves them out, so
    neither a step nor weight decay changes them. Tied embeddings are one parameter,
    token_embedding.W_E. Raises UserError for a pattern that matches no name, and if every
    parameter matches.
    """
    parameters = dict(model.named_parameters())
    frozen = {}
    for pattern in patterns:
        found = {name: p for name, p in parameters.items() if fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"no weight is named {pattern!r}"
                            f"{suggest_closest(pattern, name_patterns(parameters))}")
        frozen |= found
    if len(frozen) == len(parameters):
        raise UserError(f"freeze={' '.join(patterns)} leaves no weight to learn; freeze fewer")

    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen)


def name_patterns(names):
    """All names, and a pattern for each part of the model: "blocks.*", "blocks.0.*", …"""
    patterns = []
    for name in names:
        parts = name.split(".")
        patterns += [".".join([*parts[:n], "*"]) for n in range(1, len(parts))] + [name]
    return list(dict.fromkeys(patterns))


def make_optimizers(model, cfg):
    """The optimisers for a TrainConfig; together they update every parameter that learns once.

    With "muon", Muon learns the matrices inside the blocks and AdamW the rest; with "adamw", AdamW
    learns everything.
    """
    hidden = {}
    if cfg.optimizer == "muon":
        hidden = {name: p for name, p in model.blocks.named_parameters()
                  if p.ndim == 2 and p.requires_grad}
    rest = [p for p in model.parameters()
            if p.requires_grad and not any(p is matrix for matrix in hidden.values())]

    optimizers = []
    if rest:
        betas = (cfg.beta1, cfg.beta2)
        optimizers.append(AdamW(rest, cfg.lr, betas=betas, weight_decay=cfg.weight_decay))
    if hidden:
        parts = [3 if name.endswith("W_QKV") else 1 for name in hidden]  # q, k and v separately
        optimizers.append(
            Muon(hidden.values(), cfg.muon_lr, parts=parts, weight_decay=cfg.weight_decay))
    return optimizers


def schedule(step, max_steps, warmup_steps=0, *, shape="linear", final_fraction=0.0):
    """The learning-rate schedule: the share of the full rate at step 0, 1, …, max_steps - 1.

    It rises linearly over warmup_steps, while Adam's averages are still unreliable. Then it falls
    to final_fraction: linearly ("linear"), along half a cosine ("cosine"), or only over the last
    fifth ("trapezoid"). The fall lets the noise of the batches average out.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps

    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))  # 0 to 1
    remaining = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "trapezoid": min(1.0, (1 - progress) / 0.2),
    }[shape]
    return final_fraction + (1 - final_fraction) * remaining


@torch.no_grad()
def clip_gradients_(parameters, most):
    """Gradient clipping: scales all gradients so that their joint norm is at most `most` (0: off).

    The direction of the step does not change. Returns the norm before clipping, a 0-d tensor.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if most > 0:
        torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
