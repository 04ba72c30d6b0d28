"""A small real tokenizer for tests: `letters`, one token a byte, in ChatML."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from marketplace.catalog.models import TokenizerFiles

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def letters_tokenizer() -> Tokenizer:
    """One token a byte, and the two ChatML marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def tokenizer_files() -> TokenizerFiles:
    return TokenizerFiles(letters_tokenizer().to_str().encode(), CHATML, {})


def prompt_tokens(content: str) -> int:
    """What `letters` makes of one user message: two marks, "user\\n", the text, "\\n", the opening."""
    return len(["<s>", *b"user\n", *content.encode(), "</s>", *b"\n", "<s>", *b"assistant\n"])
