"""Runs in the engine's own environment: vLLM's prompt ids for the cases on stdin, without an engine.

Input: {"model": folder, "template": str or null, "cases": [{"messages": …, "tools": …}]}; output: a list of
{"prompt": text, "ids": [token ids], "parts": did the template get content in parts}.
"""

import json
import logging
import sys
from types import SimpleNamespace


def main() -> None:
    logging.disable(logging.CRITICAL)
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import hf
    from vllm.renderers.chat_utils import parse_chat_messages

    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    model = SimpleNamespace(
        multimodal_config=None, enable_prompt_embeds=False, revision=None, code_revision=None,
        trust_remote_code=False, hf_config=SimpleNamespace(model_type="llama"),
    )  # fmt: skip
    answers = []
    for case in asked["cases"]:
        template = case.pop("template", None) or tokenizer.chat_template
        parts = hf._detect_content_format(template, default="string")
        try:
            request = ChatCompletionRequest.model_validate({"model": "m", **case})
            tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
            conversation, _, _ = parse_chat_messages(request.messages, model, content_format=parts)
            params = request.build_chat_params(template, "auto").with_defaults(
                {"tools": tools, "tokenize": False}, None, None
            )
            prompt = hf.safe_apply_chat_template(
                model, tokenizer, conversation, **params.get_apply_chat_template_kwargs()
            )
        except Exception as e:
            answers.append({"refused": f"{type(e).__name__}: {e}"[:300]})
            continue
        ids = tokenizer(prompt, add_special_tokens=request.add_special_tokens).input_ids
        answers.append({"prompt": prompt, "ids": ids, "parts": parts == "openai"})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
