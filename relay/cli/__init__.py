"""The command `outbox`: what it asks, does and prints."""
