"""The marketplace: the book, the gateway, the watchers and the settler."""
