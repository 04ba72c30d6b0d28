"""Who serves what he sells: facts, standing, and what follows from it."""
