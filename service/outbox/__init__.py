"""The transactional outbox, as a domain sees it.

`publish` writes an event in the caller's transaction; `@consumer` registers what is done about it; `Delivery` is how
a consumer opens the session whose commit also completes the delivery.
"""
