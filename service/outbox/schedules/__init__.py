"""Events that are published again and again: by a cron expression in a time zone, or at intervals.

`@scheduled` says it in the code, `schedule` at run time. How a schedule fires once each time is told in
`service/ledger/scheduling.py`.
"""
