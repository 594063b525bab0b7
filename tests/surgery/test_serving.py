"""transformers serves a lean folder: its own server, started in a process that imports leanformers first."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from leanformers.surgery import FactoriseLinear, KeepHeads, KeepNeurons, apply
from vocabularies import CHAT, byte_level

SERVING = ("fastapi", "uvicorn", "openai", "pydantic")  # what transformers[serving] brings
SERVE = "import leanformers, transformers.cli.transformers as cli; cli.main()"  # what docs/loading.md says
PROMPT = "Return a list of the names."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lean decoder that chats, saved with its tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("served") / "lean", byte_level()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(config).eval()
    apply(model, KeepHeads(path="layers.0.self_attn", size=1), keep=torch.tensor([1]))
    apply(model, KeepNeurons(path="layers.0.mlp", size=40), keep=torch.arange(40))
    apply(model, FactoriseLinear(path="layers.1.self_attn.q_proj", rank=8))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def greedy(folder: Path, ids: Any, new_tokens: int) -> Any:
    """The ids that the model writes after a prompt, by generate."""
    model, given = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([ids])
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :]


def test_a_pipeline_writes_with_a_lean_model(folder):
    writer = pipeline("text-generation", model=str(folder))
    tokenizer = writer.tokenizer
    found = writer(PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    wanted = greedy(folder, tokenizer(PROMPT)["input_ids"], 6)
    assert found == tokenizer.decode(wanted, skip_special_tokens=True)


@contextmanager
def serving(code: str, folder: Path, log: Path) -> Iterator[tuple[Any, str]]:
    """`transformers serve` as a process, with its address; it is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def answered(process: Any, address: str, seconds: float = 240) -> bool:
    """Waits until the server answers, or its process has ended; whether it answers."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    return False


def asked(address: str, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers.cli.serving") is None or not all(map(importlib.util.find_spec, SERVING)),
    reason="needs transformers[serving]",
)
def test_transformers_serves_a_lean_folder(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = tokenizer.decode(greedy(folder, ids, 8), skip_special_tokens=True)
    with serving(SERVE, folder, tmp_path / "log") as (process, address):
        assert answered(process, address), (tmp_path / "log").read_text()[-3000:]
        body = {"model": str(folder), "messages": messages, "max_tokens": 8, "temperature": 0.0, "stream": False}
        answer = asked(address, "/v1/chat/completions", **body)
    assert answer["choices"][0]["message"]["content"] == wanted
    assert answer["usage"]["completion_tokens"] == 8

    # Without the import the server does not start, and says what to do.
    with serving(SERVE.replace("leanformers, ", ""), folder, tmp_path / "without") as (process, address):
        assert not answered(process, address)
    assert "import-leanformers-first" in (tmp_path / "without").read_text()
