"""Parts that benchmarks share.

environment       embedded Postgres, a sink process with a journal, people, settings
seed_data         rows of a large outbox
smtp_baseline     a loop of aiosmtplib's sendmail
smtp_by_hand      a loop written by hand, to smtp-sink
render_baseline   a loop that renders and builds
latency_proxy     a slow network
fault_proxy       a network that can be cut
freeze            stops, resumes and kills a whole Postgres server
starttls_sink     the sink with STARTTLS
pgbouncer         a pooler before Postgres
process_usage     what processes use of the machine
die_with_parent   processes that end with their parent
figures           spread and targets of a figure, and the table
plots             panels of results
svg               draws them as docs/benchmarks.svg
run_all           all benchmarks one after the other
"""
