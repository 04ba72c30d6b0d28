"""People, their wallets, sessions and API keys: who may do what, and how they prove it."""
