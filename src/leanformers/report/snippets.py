"""The lines of Python that load a point and use it; they work when pasted."""

from __future__ import annotations

SENTENCE = "A warm and funny film."

TIERS = {
    "stock": "transformers alone loads it",
    "lean": "loads after import leanformers",
    "runtime": "an exported folder, loaded by its runtime",
}
"""What each tier asks of the one who loads a point."""


def load_lines(folder: str, kind: str, tier: str | None = "lean", runtime: str | None = None) -> list[str]:
    """Two lines of Python that load the checkpoint in `folder` and use it on a sentence.

    kind: the task's. A stock checkpoint is loaded without importing leanformers, an exported folder by its runtime;
    one that was measured packed is packed.
    """
    if (runtime or "").startswith("torch-packed"):
        return _packed(folder, kind, ", compile=True" if runtime == "torch-packed-compile" else "")
    if tier == "runtime":
        return _exported(folder, runtime or "")
    imports = "import " if tier == "stock" else "import leanformers, "
    if kind == "embedding":
        return [
            f"{imports}sentence_transformers",
            f"print(sentence_transformers.SentenceTransformer({folder!r}).encode({SENTENCE!r}))",
        ]
    if kind == "causal-lm":
        return [
            f"{imports}transformers",
            f"print(transformers.pipeline('text-generation', {folder!r})('Return the', max_new_tokens=20))",
        ]
    if kind == "masked-lm":
        return [
            f"{imports}transformers; fill = transformers.pipeline('fill-mask', {folder!r})",
            "print(fill(f'This film is {fill.tokenizer.mask_token}.'))",
        ]
    options = ", function_to_apply='none'" if kind == "text-regression" else ""
    return [
        f"{imports}transformers",
        f"print(transformers.pipeline('text-classification', {folder!r}{options})({SENTENCE!r}))",
    ]


def _packed(folder: str, kind: str, options: str) -> list[str]:
    if kind == "embedding":
        made = f"leanformers.pack(sentence_transformers.SentenceTransformer({folder!r}){options})"
        return ["import leanformers, sentence_transformers", f"print({made}.encode({SENTENCE!r}))"]
    name = {"masked-lm": "fill-mask"}.get(kind, "text-classification")
    more = ", function_to_apply='none'" if kind == "text-regression" else ""
    text = "f'This film is {pipe.tokenizer.mask_token}.'" if kind == "masked-lm" else repr(SENTENCE)
    return [
        f"import leanformers, transformers; pipe = transformers.pipeline({name!r}, {folder!r}{more})",
        f"pipe.model = leanformers.pack(pipe.model{options}); print(pipe({text}))",
    ]


def _exported(folder: str, runtime: str) -> list[str]:
    if runtime.startswith("llama.cpp"):
        path = f"{folder}/model.gguf"
        return ["import llama_cpp", f"print(llama_cpp.Llama({path!r}, verbose=False)('Return the', max_tokens=20))"]
    tokens = f"transformers.AutoTokenizer.from_pretrained({folder!r})({SENTENCE!r}, return_tensors='pt')"
    if runtime == "torch-aot":
        path = f"{folder}/model.pt2"
        return [
            "import torch._inductor, transformers.modeling_outputs",
            f"print(torch._inductor.aoti_load_package({path!r})(**{tokens}))",
        ]
    return [
        "import transformers, transformers.exporters",
        f"print(transformers.exporters.ExportedModel.from_pretrained({folder!r})(**{tokens}))",
    ]
