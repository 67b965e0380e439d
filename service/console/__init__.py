"""The operators' console: pages that show what goes through the outbox, and forms that steer it.

An ASGI application of its own on a port of its own: `python -m service.console`. It is built on the ledger alone, and
nothing imports it. To do without, delete the folder; `docs/console.md` says what else goes.

`static/htmx.min.js` is htmx 4.0.1 as it was released (https://htmx.org, Zero-Clause BSD). It fetches a page again and
exchanges what has changed on it.
"""
