"""Real servers, and all that a test starts."""
