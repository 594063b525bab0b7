"""Opens an exported folder in a process of its own and says how far its answers lie from those expected.

It runs as a script and does not import leanformers, so that it sees what a user of the folder sees (a
decoder's cache and the bindings of llama.cpp excepted, which leanformers drives)::

    python child.py TARGET FOLDER EXPECTED.safetensors

EXPECTED holds tensors `<case>.input.<name>` and `<case>.output`. One line of JSON per case is printed:
{"case", "difference" (largest absolute, over real positions), "scale" (largest absolute output), "agreement"
(share of positions with the same largest output)}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def opened(target: str, folder: Path) -> Callable[[dict[str, Any]], Any]:
    """A function from input tensors to what the model returns."""
    if target in ("onnx", "openvino"):
        from transformers.exporters import ExportedModel

        # OpenVINO would round to bfloat16 by itself where the processor has it.
        options: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if target == "openvino" else {}
        exported = ExportedModel.from_pretrained(str(folder), device="cpu", local_files_only=True, **options)
        if (folder / "generation_config.json").is_file():  # a decoder, which takes a cache besides
            from leanformers.runtimes.generation import score

            return lambda inputs: score(exported, inputs["input_ids"], inputs["attention_mask"])
        return lambda inputs: exported(**inputs)
    if target == "torch":
        import transformers.modeling_outputs
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(folder / "model.pt2"))
        return lambda inputs: package(**inputs)
    if target == "gguf":
        from leanformers.runtimes.llama_cpp import Session

        session = Session(folder / "model.gguf", exact=True)
        return lambda inputs: session.batch_logits(inputs["input_ids"], inputs["attention_mask"])
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    return lambda inputs: model(**inputs)


def first(output: Any) -> torch.Tensor:
    """The tensor that counts of a model's output: logits, hidden states, or the first there is."""
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if value is not None:
            return value
    if isinstance(output, torch.Tensor):
        return output
    return next(iter(output.values() if isinstance(output, dict) else output))


def compared(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> dict[str, float]:
    """How far two outputs lie apart; positions of padding are left out."""
    if expected.dim() == 3 and mask is not None and mask.shape == expected.shape[:2]:
        real = mask.bool()
        found, expected = found[real], expected[real]
    found, expected = found.float(), expected.float()
    return {
        "difference": float((found - expected).abs().max()),
        "scale": float(expected.abs().max()),
        "agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def main() -> None:
    target, folder, path = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    tensors = load_file(path)
    run = opened(target, folder)
    for case in sorted({name.partition(".")[0] for name in tensors}):
        prefix = f"{case}.input."
        inputs = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        with torch.inference_mode():
            found = first(run(inputs))
        distance = compared(found, tensors[f"{case}.output"], inputs.get("attention_mask"))
        sys.stdout.write(json.dumps({"case": case, **distance}) + "\n")


if __name__ == "__main__":
    main()
