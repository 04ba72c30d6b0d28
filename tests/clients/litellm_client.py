"""LiteLLM against a gateway: base URL, key and model come as arguments; prints facts as JSON."""

import json
import sys

import litellm


def main(base_url: str, api_key: str, model: str) -> None:
    litellm.telemetry = False
    common = {"api_base": base_url, "api_key": api_key, "max_tokens": 50, "num_retries": 0}
    messages = [{"role": "user", "content": "Hi"}]
    whole = litellm.completion(model=f"openai/{model}", messages=messages, **common)
    chunks = list(litellm.completion(model=f"openai/{model}", messages=messages, stream=True, **common))
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="Once", **common)
    try:
        litellm.completion(model="openai/none", messages=messages, **common)
        refused = None
    except Exception as error:
        refused = [type(error).__name__, getattr(error, "status_code", None)]
    facts = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "text": text.choices[0].text,
        "tokens": whole.usage.completion_tokens,
        "refused": refused,
    }
    print(json.dumps(facts))


main(*sys.argv[1:])
