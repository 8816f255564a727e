"""llama.cpp, as its Python package xllamacpp runs it: what a GGUF file says."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from tests.peers import require


class LlamaCpp:
    """A model that llama.cpp has read, on the CPU with a float32 cache."""

    def __init__(self, file: Path, context: int = 64, parallel: int = 1, threads: int = 1):
        library = require("xllamacpp")
        settings = library.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.n_parallel = parallel
        settings.warmup = False
        settings.fit_params = False
        settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.verbosity = -1
        self._server = library.Server(settings)
        # Destroyed before its loop has started, the server would wait for the end of that loop forever.
        self.continued([1], 1)

    def continued(self, prompt: list[int], tokens: int) -> list[int]:
        """So many tokens, each the most likely one, whatever they are."""
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        return self._ask("completion", request | {"cache_prompt": False, "return_tokens": True})["tokens"]

    def greedy(self, prompt: list[int], tokens: int, vocab_size: int) -> tuple[list[int], np.ndarray]:
        """(the tokens that it goes on with, the log-probabilities [tokens, V] that it took them by).

        Of a token that only begins a character it gives none: NaN.
        """
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": vocab_size}
        answer = self._ask("completion", request | {"cache_prompt": False, "return_tokens": True})
        log_p = np.full((len(answer["tokens"]), vocab_size), np.nan)
        steps = answer["completion_probabilities"]
        for row, token in zip(log_p, answer["tokens"], strict=True):
            if steps and steps[0]["id"] == token:
                for best in steps.pop(0)["top_logprobs"]:
                    row[best["id"]] = best["logprob"]
        assert not steps
        return answer["tokens"], log_p

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids; `special`: with what stands before every text."""
        return self._ask("tokenize", {"content": text, "add_special": special, "parse_special": False})["tokens"]

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation with the prompt for an answer, as its chat gives them to the model."""
        prompt = self._ask("apply-template", {"messages": messages})["prompt"]
        return self._ask("tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._ask("detokenize", {"tokens": ids})["content"]

    def infill(self, prefix: str, suffix: str) -> str:
        """The prompt, as a text, that it makes of what is before and after a gap."""
        request = {"input_prefix": prefix, "input_suffix": suffix, "prompt": "", "n_predict": 1, "temperature": 0}
        return str(self._ask("infill", request | {"cache_prompt": False})["prompt"])

    def _ask(self, what: str, content: dict[str, Any]) -> Any:
        url = f"{self._server.listening_address}/{what}"
        request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
