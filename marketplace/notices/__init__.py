"""What people are told without asking: an outbox in the book, delivered by e-mail and signed webhooks."""
