"""llama.cpp's own server with continuous batching, over its HTTP interface; the checkpoint as a GGUF file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from benchmarks.contenders.checkpoint import made_once, merges, vocabulary
from benchmarks.contenders.contender import Missing, Session, Setup
from benchmarks.contenders.http_server import HttpServer
from benchmarks.workload import LENGTHS, Job

# Greedy in the fewest steps: by default six samplers look at the vocabulary before the temperature makes them all pointless.
GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}


class LlamaServer(Session):
    def __init__(self, setup: Setup, dtype: str, slots: int) -> None:
        if setup.device != "cpu":
            raise Missing("measured on a CPU only")
        if setup.llama_server is None:
            raise Missing("no --llama-server")
        if not os.access(setup.llama_server, os.X_OK):
            raise Missing(f"not a program: {setup.llama_server}")
        path = setup.checkpoint.with_name(f"{setup.checkpoint.name}.{dtype}.gguf")
        model = made_once(path, lambda part: write_gguf(setup.checkpoint, part, dtype))
        command = [setup.llama_server, "-m", str(model), "-t", str(len(os.sched_getaffinity(0)))]
        command += ["-np", str(slots), "-c", str(slots * 2 * LENGTHS[1]), "-cb", "--no-webui", "--offline", "--log-disable"]
        # No cache of prompts anywhere: each is computed, as everyone else computes it.
        command += ["--no-cache-prompt", "--cache-ram", "0", "--no-cache-idle-slots"]
        self._server = HttpServer(lambda port: [*command, "--port", str(port)], os.environ)
        self.dtype = dtype

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        bodies = [
            {"prompt": prompt, "n_predict": length, "cache_prompt": False, "return_tokens": True} | GREEDY
            for prompt, length in jobs
        ]
        return [answer["tokens"] for answer in self._server.post_all("/completion", bodies)]

    def close(self) -> None:
        self._server.close()


def write_gguf(checkpoint: Path, path: Path, dtype: str) -> None:
    """As llama.cpp's convert_hf_to_gguf.py does it: matrices in `dtype`, vectors and position embeddings in float32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    kind = gguf.GGMLQuantizationType[dtype]
    writer = gguf.GGUFWriter(path, "gpt2", use_temp_file=True)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype}"])
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges(tokens))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    with safe_open(checkpoint / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            values = file.get_tensor(name)
            new = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
            if ".h." in name and values.ndim == 2:  # (in, out) there, (out, in) here
                values = values.T
            stored = kind if values.ndim == 2 and "position" not in new else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(values), stored)
            writer.add_tensor(new, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
