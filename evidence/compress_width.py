"""How the time of compressing a layer grows with its width: six methods on random Llamas of two layers, power fitted.

Calls are whole (a method with its calibration or its few steps of training) and divided by the layers; what is set up
once is warmed up before. Settings are small and the same at every width, so the seconds are no cost of a real run: they
are there for the power, which is fitted to the larger half of the widths. The powers required are those of the cards'
costs, with 0.3 for the fit: width^2 weights that are passed over, times width for SliceGPT's eigenvectors, DSFormer's
dictionaries (as wide as the budget allows) and AxFormer's trials (one for each head and group of neurons). On a GPU
small widths cost what their launches cost, and powers come out lower. On a CPU the seconds are those of one core, which
others on the machine hardly change, and widths and texts are smaller; on a GPU, alone. --small is a dry run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers as T

from claim import Evidence, arguments
from common import device
from leanformers.methods import Subject, build
from leanformers.tasks.docstrings import docstrings_lm

LAYERS, HEAD, MARGIN = 2, 64, 0.3
POWERS = {"slicegpt": 3, "obert": 2, "fusegpt": 2, "vtrans": 2, "dsformer": 3, "axformer": 3}  # of the cards' costs
WIDTHS: Mapping[str, tuple[int, ...]] = {"cpu": (128, 256, 512), "cuda": (256, 512, 1024, 2048)}
LENGTHS: Mapping[str, int] = {"cpu": 64, "cuda": 256}  # tokens of a text
REPEATS: Mapping[str, int] = {"cpu": 1, "cuda": 3}
STEPS: Mapping[str, dict[str, Any]] = {
    "slicegpt": {"slice": 0.2, "samples": 64, "tokens": 2_048, "batch_size": 16},
    "obert": {"sparsity": 0.5, "gradients": 16, "gradient_batch": 4, "block_size": 16},
    "fusegpt": {"sparsity": 0.5, "group": 2, "samples": 16, "score_samples": 8, "length": 64, "epochs": 2},
    "vtrans": {"target": 0.3, "variant": "faster", "limit": 32, "epochs": 1.0},
    "dsformer": {"ratio": 2.8, "iterations": 1, "epochs": 0.0},
    "axformer": {"k": None, "samples": 8, "factor": 1e6},
}
LARGER: Mapping[str, dict[str, Any]] = {  # on a GPU
    "slicegpt": {"tokens": 16_384},
    "obert": {"gradients": 64, "gradient_batch": 8},
    "fusegpt": {"samples": 64, "score_samples": 16, "length": 256},
    "vtrans": {"limit": 128},
    "dsformer": {"iterations": 2},
    "axformer": {"samples": 32},
}


def model_of(width: int, length: int) -> Any:
    """A random Llama that reads bytes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // HEAD}
    config = T.LlamaConfig(
        **sizes, num_hidden_layers=LAYERS, vocab_size=384, max_position_embeddings=length, pad_token_id=0
    )
    model: Any = T.LlamaForCausalLM(config)
    return model.to(device()).eval()


def seconds_per_layer(step: Mapping[str, Any], width: int, task: Any) -> float:
    one = Subject(model=model_of(width, task.max_length), tokenizer=T.ByT5Tokenizer(), task=task)
    if device() == "cpu":
        start = time.process_time()
        build(step)(one)
        return (time.process_time() - start) / LAYERS
    torch.cuda.synchronize()
    start = time.perf_counter()
    build(step)(one)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / LAYERS


def main() -> None:
    given = arguments(__doc__).parse_args()
    where = device()
    if where == "cpu":
        torch.set_num_threads(1)
    widths = (64, 128, 192) if given.small else WIDTHS[where]
    task = docstrings_lm(size=128, max_length=LENGTHS[where])
    with Evidence(
        "compress-width",
        claim="Compressing a layer takes time that grows with its width no faster than the cost that its card states",
        paper="the cards of slicegpt, obert, fusegpt, vtrans, dsformer, axformer",
        folder=given.results,
    ) as evidence:
        seconds: dict[str, dict[int, float]] = {}
        powers: dict[str, float] = {}
        for slug, settings in STEPS.items():
            step = {"method": slug, **settings, **(LARGER[slug] if where == "cuda" else {})}
            seconds_per_layer(step, widths[0], task)  # what is set up once
            seconds[slug] = {
                width: statistics.median(seconds_per_layer(step, width, task) for _ in range(REPEATS[where]))
                for width in widths
            }
            upper = list(seconds[slug].items())[len(widths) // 2 - 1 :]
            x, y = (np.log([pair[i] for pair in upper]) for i in (0, 1))
            powers[slug] = float(np.polyfit(x, y, 1)[0])
            print(f"{slug}: {seconds[slug]}, power {powers[slug]:.2f}", flush=True)
            name = f"{slug}: seconds per layer grow with the width to the power of"
            evidence.check(name, powers[slug], f"<= {POWERS[slug] + MARGIN}")
        evidence.result = {
            "seconds_per_layer_by_width": seconds,
            "power_of_the_width": powers,
            "seconds_of": "one core" if where == "cpu" else "the GPU",
        }


if __name__ == "__main__":
    main()
