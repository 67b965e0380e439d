"""The example domain: products with stock, and orders that take from it. Delete the folder to start your own."""
