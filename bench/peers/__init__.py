"""The same job done by each peer at its documented best: N ready emails, worker processes that drain them to the sink.

job        what a peer is told and has to send; `play`, which is what a peer's module runs
kept       SMTP connections that are kept, for asyncio and for threads

naive, procrastinate, pgqueuer, celery, django_mailer, post_office, faststream_outbox, dbos
           one peer each, run as `python -m bench.peers.NAME put|work` by the Python of .venv-peers; the docstring says
           what its documentation calls best (django_settings is the project of the two that need one)

field      who takes part, and in which variants
installed  .venv-peers, made from requirements.txt; whoever cannot be had sits out
redis      a redis-server for the peer that needs one
race       the runs, what the sink's journal says of them, the table

Only `job` and `kept` and the peers run in .venv-peers; they import nothing else of the house but `bench.end`.
"""
