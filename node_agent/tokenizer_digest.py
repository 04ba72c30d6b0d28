"""What a model's tokenizer, chat template and special tokens are, as one number.

The marketplace counts prompts with the files it pinned when the model was listed. An engine with other
files renders other prompts: its counts drift and its answers fail the checks. So both sides hash the same
bytes: SHA-256 of (SHA-256 of tokenizer.json, then JSON of [chat template, special tokens], keys sorted).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

FILE_BYTES_MAX: Final = 64 * 1024 * 1024
SPECIAL_TOKENS: Final = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)


class NoTokenizerError(Exception):
    """The folder does not hold a tokenizer that can be read; the text says why."""


def digest_of(folder: Path) -> str:
    """Give the digest of a Hugging Face model folder; raises `NoTokenizerError`."""
    try:
        if (folder / "tokenizer.json").stat().st_size > FILE_BYTES_MAX:
            raise NoTokenizerError(f"{folder / 'tokenizer.json'} has more than {FILE_BYTES_MAX} bytes")
        tokenizer = (folder / "tokenizer.json").read_bytes()
        described: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_bytes())
        template = described.get("chat_template")
        if (folder / "chat_template.jinja").exists():  # which outranks the older place, as in transformers
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        special = {
            name: value if isinstance(value, str) else str(value["content"])
            for name in SPECIAL_TOKENS
            if (value := described.get(name))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoTokenizerError(f"{folder} is not a model folder ({error})") from error
    if not isinstance(template, str):
        raise NoTokenizerError(f"{folder} has no chat template")
    digest = hashlib.sha256(hashlib.sha256(tokenizer).digest())
    digest.update(json.dumps([template, special], sort_keys=True).encode())
    return digest.hexdigest()
