"""The floor under a training step: what cannot be left out, each part measured on the same card.

1. The encode product, (batch, d_in) x (d_in, d_sae), in the compute dtype.
2. One pass over its output: it is read once to choose what fires.
3. The sparse gathers at memory bandwidth: k rows of W_dec for each row of the batch, and k batch rows for each of the
   gradients of W_dec and W_enc.
4. The optimiser's traffic at memory bandwidth: weights and both moments of both matrices, read and written in float32.

Bandwidth is that of a large copy, bytes read and written; on a CPU, where a copy of a batch's pre-activations may fit
in no cache either, the same.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Floor", "measure_floor", "seconds_of"]

COPY_BYTES = 2**30
CPU_COPY_BYTES = 2**27
REPEATS = {"cuda": 10, "cpu": 3}


class Floor(NamedTuple):
    """Seconds of each part, and the bandwidth behind them."""

    encode: float
    output_pass: float
    gathers: float
    optimiser: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        return self.encode + self.output_pass + self.gathers + self.optimiser


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int | None = None) -> float:
    """Median time of a call, after warm-up; on a GPU by events."""
    repeats = repeats or REPEATS[device.type]
    for _ in range(2):
        run()
    if device.type == "cpu":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def measure_floor(d_in: int, d_sae: int, k: int, batch_size: int, device: torch.device) -> Floor:
    """Measure all parts for one shape, on random numbers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(batch_size, d_in, device=device).to(dtype)
    W = torch.randn(d_sae, d_in, device=device).to(dtype)
    out = torch.empty(batch_size, d_sae, dtype=dtype, device=device)
    encode = seconds_of(lambda: torch.mm(x, W.T, out=out), device)
    del out
    source = torch.empty(COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    bandwidth = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)
    item = x.element_size()
    return Floor(
        encode=encode,
        output_pass=batch_size * d_sae * item / bandwidth,
        gathers=3 * batch_size * k * d_in * item / bandwidth,
        optimiser=2 * d_in * d_sae * 6 * 4 / bandwidth,
        bytes_per_second=bandwidth,
    )
