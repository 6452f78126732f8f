"""Measurements and faults: real processes, real Postgres with fsync on, a sink that is not the bottleneck.

world      the machine of one run: embedded Postgres, a sink process with a journal, people, settings
fleet      N servers fire their cron at once, M relays send: rates, latencies, duplicates, losses
relay      one relay process against two loops that have no database: one by hand to smtp-sink, aiosmtplib's sendmail
baseline   the loop of sendmail; by_hand: the loop by hand
generate   making reports, against a bare loop that renders and builds the same
bare       that loop
relays     what a fleet's size does to its speed, and what idle relays cost
rate       how exact the fleet's rate is while relays come and go
roundtrip  mail over a slow network, against what round trips allow
slow       that network
mailbox    the sink with STARTTLS
latency    how long a single email waits for an idle fleet
growth     what an email costs as tables grow; in cost, residue, pruning and stock: its parts, and the rows
startup    what a command costs before it works, against bare imports
usage      what processes use of the machine
scale      past one Postgres by itself: a synchronous standby, two servers, crons on a pooler
pooler     that pooler
everything all benchmarks one after the other, and one table of targets
plots      what the results show as panels; picture draws them as docs/benchmarks.svg
figures    a measurement's spread, what was promised of it, and the table of both
peers      emails of one kind by outbox and by its peers, each at its documented best; one relay and smtp-source
end        processes that end with the one that made them

faults     a fleet under faults, all from a seed; in the order of its rooms:
options    the arguments, the bound within which all must be settled, the command that replays
plan       the schedule: which fault, when, on whom, for how long
company    people who are owed reports, and the servers' settings
host       a server: its two ways out and its processes
proxy      a network that one can break
mail       the mail server: its pace and its moods, and what reached it
arena      all of these together: what faults take hold of
fault      what a fault is; process_faults, postgres_faults, network_faults: those there are
nemesis    carries out the schedule
record     what is known when a run is over
checker    what was accepted against what the database says: the laws, and who was wronged
verdict    verdict.json and timeline.svg
timeline   the run as a picture
campaign   many seeds, a table, and the command that replays what broke

takeover   how long until others have sent what a lost relay held
"""
