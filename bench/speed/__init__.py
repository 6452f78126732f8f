"""One module per benchmark.

fleet            N servers start their cron at once, M relays send: rates, latencies, duplicates, losses
one_relay        one relay process against two loops without a database
generate         making reports, against a loop that only renders and builds
relay_scaling    speed by size of the fleet, and what idle relays cost
rate_limit       how exact the fleet's rate is while relays come and go
slow_network     a slow network, against what round trips allow
enqueue_latency  how long a single email waits for an idle fleet
table_growth     cost of an email as tables grow
tick_cost        cost of the parts of a tick
dead_tuples      cost of dead tuples
prune            cost of `outbox prune`
reads            cost of what people and monitoring read, beside few and many old emails
cli_startup      cost of a command before it works, against bare imports
scale_out        beyond one Postgres: a synchronous standby, two servers, crons on a pooler
takeover         how long until others have sent what a lost relay held
report_page      requests per second of report pages
board            the same of the board
"""
