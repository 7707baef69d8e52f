"""How many captions a second the input covariance is estimated from."""

import time
from collections.abc import Iterator
from typing import Any

from bench_covariance import captions
from gpu.cells import synchronize


def captions_a_second(pipe: Any, deadline: float) -> dict[str, Any]:
    """Estimate a pipeline's covariance from as many captions as fit before a deadline, at least a batch."""
    from perfusion_pytorch import calculate_input_covariance
    from perfusion_pytorch.pipelines.covariance_cache import BATCH_SIZE
    from perfusion_pytorch.pipelines.encoding import prompt_encoder

    encode = prompt_encoder(pipe)
    calculate_input_covariance(captions(2 * BATCH_SIZE), encode, batch_size=BATCH_SIZE)  # warms up
    count = 0

    def until_deadline() -> Iterator[str]:
        nonlocal count
        for caption in captions(10**9):
            if count >= BATCH_SIZE and time.perf_counter() > deadline:
                return
            count += 1
            yield caption

    synchronize()
    start = time.perf_counter()
    calculate_input_covariance(until_deadline(), encode, batch_size=BATCH_SIZE)
    rate = count / (time.perf_counter() - start)
    return {
        "batch size": BATCH_SIZE,
        "captions a second": rate,
        "minutes of 100,000 captions": 100_000 / rate / 60,
    }
