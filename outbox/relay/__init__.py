"""Emails are sent: `outbox relay`. One relay is one Postgres session, one advisory lock, one identity.

supervisor       one relay for each route of this process
relay            the main loop: claims to connections, verdicts to the next tick
session          registers the relay and holds its lock
reopening        pauses and log lines while no session can be opened
ledger           SQL of every email: claim, mark, settle, release, expire, sweep
quarantine       rows that cannot be read or written
isolate          a tick in parts, to find such rows
memory_budget    memory for large messages, shared by the relays of a process
notifications    rests after notifications that lead to no work
pool             decides which tries start on the SMTP connections, and about those that come back
connections      the SMTP connections: opened, idle or busy, watched, closed
ready_queue      tries that wait for a connection
returns          emails that go back to Postgres in the next turn
marks            marks that connections ask for, and the guard before the final dot
verdicts         verdicts on tries, until a tick writes them
server_state     what is known of the mail server: trouble, refusals, limits
sender_holds     senders whose mail waits, since the server refuses it
backoff          how long until the next try
rate_limit       the rate that the fleet shares
throttle         rate and number of connections that a server accepts, found from its replies
circuit_breaker  stops connecting while the server is in trouble, for this relay and for the fleet
refusals         refusals that may be about the sender or this host, and how they are undone
pauses           reports and the fleet, paused by a person
suppression      addresses that get no more email
in_doubt         what happens automatically to an email in doubt: sent again, or evidence is looked up
failover         recent verdicts, reported again to a server that lacks them
observer         interface for metrics and traces
"""
