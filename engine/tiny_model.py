"""Build a tiny random chat model, for tests that need a real engine but no sense.

Two layers, hidden size 64, heads of 32 (vLLM's CPU attention refuses 16), 1,024 byte-level BPE
tokens trained on modules of Python's standard library, ChatML. Same Python, same bytes.

Runs inside the engine environment: python tiny_model.py TARGET_DIR
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED: Final = 20_260_101
VOCABULARY: Final = 1024
HIDDEN: Final = 64
INTERMEDIATE: Final = 128
LAYERS: Final = 2
HEADS: Final = 2
KEY_VALUE_HEADS: Final = 1
HEAD_DIM: Final = 32
CONTEXT: Final = 4096
SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS: Final = (
    "argparse.py",
    "ast.py",
    "asyncio/events.py",
    "datetime.py",
    "difflib.py",
    "inspect.py",
    "typing.py",
)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(((library / name).read_text(encoding="utf-8") for name in CORPUS), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def random_weights() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(SEED)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return (random.standard_normal((rows, columns)) * 0.08).astype(np.float32)

    def ones() -> np.ndarray[Any, Any]:
        return np.ones(HIDDEN, dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": ones()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": ones(),
            f"{prefix}.post_attention_layernorm.weight": ones(),
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    weights["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    return weights


def model_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build(target: Path) -> None:
    """Write the model folder `target` (made if missing)."""
    target.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(target / "tokenizer.json"))
    save_file(random_weights(), target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", model_config())
    write_json(target / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2})
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[2],
            "unk_token": SPECIAL[0],
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a tiny random chat model for tests.")
    parser.add_argument("target", type=Path)
    build(parser.parse_args().target)


if __name__ == "__main__":
    main()
