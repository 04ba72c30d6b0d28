"""What can be bought: models, their tokenizers pinned by digest, and every price there ever was."""
