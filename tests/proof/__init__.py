"""The proof of the kernel: nothing is lost and nothing happens twice, whatever is done to it."""
