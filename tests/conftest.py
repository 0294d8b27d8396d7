"""Tiny models: one thread is faster than several, and tests that run side by side do not fight for the cores."""

import torch

torch.set_num_threads(1)
