"""What a call costs besides time: FLOPs and memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], object]


@contextmanager
def countable() -> Iterator[None]:
    """Kernels that the FLOP counter knows: it sees neither flash attention on CPU nor `nn.MultiheadAttention`'s own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of a call, 2 per multiply-add, as `torch.utils.flop_counter` counts them.

    The call runs on fake tensors (real modules, no arithmetic): it must make its own inputs with `torch.zeros`.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), countable(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        call()
    return int(counter.get_total_flops())


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that a call holds at its peak, on top of what was there before it (weights, inputs).

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the running sum of torch's own allocations and releases, as its
    profiler records them; the resident size of the process would hide a smaller peak behind an earlier, larger one.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on stderr would tear the progress bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in steps), initial=0))
