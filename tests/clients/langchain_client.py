"""LangChain against a gateway: base URL, key and model come as arguments; prints facts as JSON."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI


def main(base_url: str, api_key: str, model: str) -> None:
    chat = ChatOpenAI(base_url=base_url, api_key=api_key, model=model, max_tokens=50, max_retries=0)
    whole = chat.invoke("Hi")
    pieces = list(chat.stream("Hi", stream_usage=True))
    usage = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    batch = chat.batch(["Hi", "Hi"])
    text = OpenAI(base_url=base_url, api_key=api_key, model=model, max_tokens=50, max_retries=0)
    try:
        ChatOpenAI(base_url=base_url, api_key=api_key, model="none", max_retries=0).invoke("Hi")
        refused = None
    except Exception as error:
        refused = [type(error).__name__, getattr(error, "status_code", None), getattr(error, "code", None)]
    facts = {
        "whole": whole.content,
        "streamed": "".join(piece.content for piece in pieces),
        "text": text.invoke("Once"),
        "tokens": whole.usage_metadata["output_tokens"],
        "streamed_tokens": usage[-1]["output_tokens"],
        "batch": [answer.content for answer in batch],
        "refused": refused,
    }
    print(json.dumps(facts))


main(*sys.argv[1:])
