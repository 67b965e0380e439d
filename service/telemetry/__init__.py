"""What the processes tell: their logs, and the ids that tie them together."""
