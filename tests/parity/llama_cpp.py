"""llama.cpp, by the server in xllamacpp: log-probabilities of the next token, and the ids of texts."""

from __future__ import annotations

import importlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """A model that computes and caches in float32."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # a compiled module without types
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            settings.lora_adapters = [lora]
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup, settings.cpuparams.n_threads, settings.port = False, 1, 0
        settings.verbosity = -1
        self._server = xllamacpp.Server(settings)

    def logprobs(self, ids: list[int], size: int) -> np.ndarray:
        """(V,) log-probabilities of the token after ``ids``. The token itself is forced to be one that is
        text, since the server says nothing of other ones."""
        forced = [[self.ids("A", special=False)[0], 1000.0]]
        answer = self._server.handle_completions(
            {"prompt": ids, "n_predict": 1, "n_probs": size, "logit_bias": forced}
        )
        values = np.full(size, np.nan)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            values[token["id"]] = token["logprob"]
        return values

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Control tokens that are written out are read as such; BOS and EOS only with ``special``."""
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})[
            "tokens"
        ]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
