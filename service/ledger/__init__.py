"""The ledger: its tables, and every statement on them."""
