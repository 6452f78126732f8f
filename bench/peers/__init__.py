"""The same job done by each peer at its documented best: N ready emails, worker processes that drain them to the sink.

job               settings, queue and emails of a peer; `play` runs a peer's module
kept_connections  SMTP connections that are kept, for asyncio and for threads

naive, procrastinate, pgqueuer, celery, django_mailer, post_office, faststream_outbox, dbos
                  one peer each, run as `python -m bench.peers.NAME put|work` by the Python of .venv-peers; its
                  docstring names what the peer's documentation recommends
django_settings   project of the two peers that need one

entrants          peers that take part, and their variants
venv              .venv-peers, made from requirements.txt; a peer that cannot be installed is left out
redis             redis-server for the peer that needs one
result            results of a run from the sink's journal; the table and the ratios
race              the runs

Only the peers, `django_settings`, `job` and `kept_connections` run in .venv-peers. They import nothing else of this
repository but `bench.harness.die_with_parent`.
"""
