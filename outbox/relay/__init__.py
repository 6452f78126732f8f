"""Emails are sent: `outbox relay`. One relay is one Postgres session, one advisory lock, one identity.

supervisor       one relay for each route of this process
relay            the main loop: claims to connections, verdicts to the next tick
session          registers the relay and holds its lock
reopening        pauses and log lines while no session can be opened
tick             settles, marks and claims in one statement
claims           claims in SQL, within the memory budget, and how they are released
claiming         where the next claim begins, and the share of urgent emails
settlement       outcomes of tries on their way to the database
sweep            judges what dead relays left
expiry           ends what is too late to send
remaining        what is left to send on a route
large_messages   messages that are fetched after their claim is committed
progress_note    progress of a relay, in its row
statements       all statements that a relay prepares
quarantine       rows that cannot be read or written
isolate          a tick in parts, to find such rows
memory_budget    memory for large messages, shared by the relays of a process
notifications    rests after notifications that lead to no work
pool             the SMTP connections of a route, and the emails that wait for one
backoff          how long until the next try
rate_limit       the rate that the fleet shares
throttle         rate and number of connections that a server accepts, found from its replies
circuit_breaker  stops connecting while the server is in trouble, for this relay and for the fleet
refusals         refusals that may be about the sender or this host, and how they are undone
pauses           reports and the fleet, paused by a person
suppression      addresses that get no more email
in_doubt         emails in doubt, sent again or asked about
resolver         runs the user's function that may know what became of them
verdict_history  recent verdicts of a relay
failover         writes them again on a server that lacks them
observer         interface for metrics and traces
"""
