"""Which node serves a request: a pure choice, and the live registry it reads."""
