"""The OpenAI-compatible surface: one lean route for chat, ordinary FastAPI for everything else."""
