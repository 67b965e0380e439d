"""Connections, engine and sessions: the one way to PostgreSQL."""
