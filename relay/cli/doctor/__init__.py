"""`outbox doctor`: what is wrong with the environment, and what to do about it."""
