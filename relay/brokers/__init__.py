"""What the relay needs of a broker, and how each of them does it."""
