"""Schema history: every package has a base revision of its own; `upgrade heads` applies them all."""
