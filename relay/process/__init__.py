"""The relay itself: it hands every due delivery over to the broker."""
