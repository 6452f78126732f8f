"""Measurements: real processes, real Postgres with fsync on, a sink that is not the bottleneck.

world      the machine of one run: embedded Postgres, a sink process with a journal, people, settings
fleet      N servers fire their cron at once, M relays send: rates, latencies, duplicates, losses
relay      one relay process against a bare aiosmtplib loop that has no database
baseline   that loop
"""
