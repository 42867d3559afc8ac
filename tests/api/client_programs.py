"""Other people's clients, each as its users write it: `python client_programs.py NAME URL` prints the texts that NAME got, as
JSON. Run by the Python that BATCHLAB_CLIENTS_PYTHON names (tests/api/test_clients.py); imports nothing of the server."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PROMPT = "The old house at the end of the lane"
SETTINGS = {"temperature": 0, "max_tokens": 12}


def langchain(url: str) -> list[str]:
    from langchain_openai import OpenAI

    model = OpenAI(base_url=url, api_key="none", model="demo", **SETTINGS)
    tuned = OpenAI(base_url=url, api_key="none", model="demo", frequency_penalty=0.0, logit_bias={}, best_of=1, **SETTINGS)
    return [model.invoke(PROMPT), "".join(model.stream(PROMPT)), tuned.invoke(PROMPT), *model.batch([PROMPT])]


def litellm(url: str) -> list[str]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
    from litellm import text_completion

    asked = {"model": "text-completion-openai/demo", "prompt": PROMPT, "api_base": url, "api_key": "none", **SETTINGS}
    whole = text_completion(**asked)
    pieces = text_completion(**asked, stream=True)
    return [whole.choices[0].text, "".join(piece.choices[0].text or "" for piece in pieces if piece.choices)]


def llamaindex(url: str) -> list[str]:
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model="demo", api_base=url, api_key="none", is_chat_model=False, context_window=512, **SETTINGS)
    return [model.complete(PROMPT).text, "".join(piece.delta for piece in model.stream_complete(PROMPT))]


def llm(url: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLM_USER_PATH"] = folder
        facts = {"model_id": "batchlab", "model_name": "demo", "api_base": url, "completion": True}
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([facts]), encoding="utf-8")  # JSON is YAML
        import llm

        model = llm.get_model("batchlab")
        model.key = "none"
        return [model.prompt(PROMPT, stream=stream, **SETTINGS).text() for stream in (False, True)]


CLIENTS: dict[str, Callable[[str], list[str]]] = {  # by the module that has to be there
    "langchain_openai": langchain, "litellm": litellm, "llama_index.llms.openai_like": llamaindex, "llm": llm,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
