"""One thread for every test: the same bits everywhere, and no fight for the cores."""

import torch

torch.set_num_threads(1)
