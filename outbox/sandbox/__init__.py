"""Real Postgres and a real SMTP server for trying out and for tests.

postgres   embedded Postgres
smtp_sink  SMTP server that accepts everything, or follows a script
demo       `outbox demo`: the whole story on both
"""
