"""The tables that the GPU benchmark makes of its results."""

from gpu.table import markdown


def picture(ratio, own=None):
    return {
        "picture over the base's": ratio,
        "denoising over the base's": ratio + 0.001,
        "seconds": own or {"encoding": 0.01, "denoising": 0.5, "decoding": 0.02},
        "peak memory of denoising, bytes": 3.25e9,
    }


def step(ratio, milliseconds):
    return {
        "step over the frozen model's": ratio,
        "milliseconds": milliseconds,
        "peak memory, bytes": 20e9,
    }


RESULT = {
    "versions": {"torch": "2.11.0"},
    "device": "A card",
    "memory of the device, bytes": 80e9,
    "cells": {
        "pictures: SD 1.5, bf16": {
            "peak memory of decoding, bytes": 4.5e9,
            "contenders": {"no concept": picture(1.0), "1 concept": picture(1.0042)},
        },
        "pictures: SDXL, bf16": {
            "peak memory of decoding, bytes": None,
            "contenders": {
                "no concept": picture(1.0),
                "1 concept": {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate"},
                "LoRA, rank 1": {"error": "ValueError: no"},
            },
        },
        "waits: SD 1.5, bf16": {"waits": {"no concept": "none", "1 concept": "RuntimeError: waits"}},
        "training: SD 1.5, bf16, batch 16": {
            "contenders": {
                "frozen model": step(1.0, 120.0),
                "train_concept, outputs": step(1.01, 120.0),
                "train_concept, embedding": step(1.2, 144.0),
            }
        },
        "covariance: SD 1.5, bf16": {"captions a second": 2500.0, "minutes of 100,000 captions": 0.6667},
        "pictures: SDXL, fp16": {"skipped": "it needs about 12 s, and 3 s were left"},
        "waits: SDXL, bf16": {"error": "RuntimeError: no"},
    },
}

EXPECTED = """\
A card, 80.0 GB. torch 2.11.0.

A picture: seconds of the prompt, of denoising and of decoding without a concept, then the time over \
that; in brackets the time of denoising alone over the base's.

|  | no concept | 1 concept | LoRA, rank 1 |
| --- | --- | --- | --- |
| SD 1.5, bf16 | 0.010 + 0.500 + 0.020 s | 1.004 (1.005) | – |
| SDXL, bf16 | 0.010 + 0.500 + 0.020 s | out of memory | failed |

Peak memory of denoising and of decoding in GB, with the weights.

|  | no concept | 1 concept | LoRA, rank 1 | decoding |
| --- | --- | --- | --- | --- |
| SD 1.5, bf16 | 3.2 | 3.2 | – | 4.5 |
| SDXL, bf16 | 3.2 | out of memory | failed | – |

A training step: milliseconds of the frozen model's own, then the time over that.

|  | frozen model | train_concept, outputs | train_concept, embedding |
| --- | --- | --- | --- |
| SD 1.5, bf16, batch 16 | 120.0 ms | 1.010 | 1.200 |

Peak memory of a training step in GB, with the weights.

|  | frozen model | train_concept, outputs | train_concept, embedding |
| --- | --- | --- | --- |
| SD 1.5, bf16, batch 16 | 20.0 | 20.0 | 20.0 |

A concept: 500 steps, half of them for each phase, without the covariance.

|  | minutes | peak memory, GB |
| --- | --- | --- |
| SD 1.5, bf16, batch 16 | 1.1 | 20.0 |

The covariance, waits of a denoiser call for the GPU, and loading.

|  | found |
| --- | --- |
| waits: SD 1.5, bf16, no concept | none |
| waits: SD 1.5, bf16, 1 concept | RuntimeError: waits |
| covariance: SD 1.5, bf16 | 2,500 captions a second, 0.7 minutes for 100,000 |

Not measured:

- pictures: SDXL, bf16, 1 concept: OutOfMemoryError: CUDA out of memory. Tried to allocate
- pictures: SDXL, bf16, LoRA, rank 1: ValueError: no
- pictures: SDXL, fp16: it needs about 12 s, and 3 s were left
- waits: SDXL, bf16: RuntimeError: no
"""


def test_the_tables_of_a_result():
    assert markdown(RESULT) == EXPECTED


def test_a_result_without_cells_names_the_device_alone():
    assert markdown(RESULT | {"cells": {}}) == "A card, 80.0 GB. torch 2.11.0.\n"
