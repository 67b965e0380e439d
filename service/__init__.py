"""The service: HTTP API, workers, the outbox they share, and the business domains."""
