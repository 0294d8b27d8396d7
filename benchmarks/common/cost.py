"""What a call costs besides time: FLOPs and memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from patchselect.compat import flop_counter

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
except ModuleNotFoundError:  # torch before 2.3; `countable` says so
    FlopCounterMode = None


@contextmanager
def countable() -> Iterator[Any]:
    """Yield torch's counter of FLOPs, which counts while this lasts.

    It sees neither flash attention on CPU nor `nn.MultiheadAttention`'s own kernel: others stand in for them.

    Raises:
        RuntimeError: this torch has no such counter.
    """
    if FlopCounterMode is None:
        raise RuntimeError(f"counting FLOPs takes torch 2.3 or newer, this is {torch.__version__}")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_flops(call: Callable[[], object], fake: bool = True) -> int:
    """Count the FLOPs of a call, 2 per multiply-add, as `torch.utils.flop_counter` counts them.

    The call runs on fake tensors (real modules, no arithmetic): it must make its own inputs with `torch.zeros`. That
    takes about a second, whatever the size; not `fake`, it takes what the arithmetic takes.
    """
    tensors = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with torch.no_grad(), countable() as counter, tensors:
        call()
    return int(counter.get_total_flops())


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return bytes that a call holds at its peak, on top of what was there before it (weights, inputs).

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
