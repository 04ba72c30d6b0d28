"""A development Solana node: the real SPL programs in a real SVM, behind the JSON-RPC of a validator.

`bank` holds the state (accounts, slots, blocks, forks), `journal` makes it survive kill -9, `encoding`
turns it into the JSON a validator answers with, `server` is the HTTP front.
"""
