"""Emails are sent: `outbox relay`. One relay is one Postgres session, one advisory lock, one identity.

supervisor       one relay for each route of this process
relay            the main loop: one turn after the other, and the end
ticker           one tick and what follows from it; when the guard finds a final dot too late
parts            parts of a relay, and their connections with each other
session_keeper   opens the first session, replaces a lost one, limits all waits for Postgres
reopening        pauses and log lines while no session can be opened
session          a Postgres session: identity, lock, listening, loss
lock_proof       self-test: advisory locks of this database exclude sessions
registration     the row and the lock of a new session; earlier sessions are ended
lease_connection connections that Postgres ends when the client is silent
statements       all statements that a session prepares
boot_clock       clock that also runs while the machine sleeps
barrier_watch    a relay's place at the failover barrier, across its sessions
reassertion      what a new session writes before it claims
verdict_history  recent verdicts of a relay
failover         writes them again on a server that lacks them
timers           due times of the main loop
wake_up          sleep of the main loop, and what ends it
notifications    rests after notifications that lead to no work
claim_trigger    claims at once after a notification or other news
claim_intake     how many a tick claims, which of them may be sent, and when to claim again
claiming         where the next claim begins, and the share of urgent emails
claims           the shared part of a claim in SQL: columns, memory budget, release
suspects         one suspect at a time for the relays of a process
tick             one statement that writes verdicts and marks, chooses what is due and claims it
tick_runner      a tick in one statement, or in parts
isolate          a tick in parts, to find rows that make it fail
quarantine       rows that cannot be read or written
settlement       outcomes of tries on their way to the database
holds            claims that are paused or suppressed
pauses           sets aside what a person has paused, and takes it up
suppression      cancels claims of suppressed addresses (rule: `outbox.suppressed`)
message_fetch    large messages, fetched and checked bit by bit after their claim is committed
memory_budget    memory for large messages, shared by the relays of a process
pool             decides which tries start on the SMTP connections, and about those that come back
pool_facts       facts about a pool: capacity, trouble, numbers of connections
in_flight        all emails that a relay holds, wherever they are
connections      the SMTP connections: opened, idle or busy, watched, closed
ready_queue      tries that wait for a connection
returns          emails that go back to Postgres in the next turn
marks            marks that connections ask for (`tick` writes them), and the guard before the final dot
verdicts         verdicts on tries, until a tick writes them
server_state     what is known of the mail server: trouble, refusals, limits
sender_holds     senders whose mail waits, since the server refuses it
route_state      breaker and rate of a route, shared with the fleet
circuit_breaker  stops connecting while the server is in trouble, for this relay and for the fleet
rate_limit       the rate that the fleet shares
found_rate       the rate that a server takes, found from what it refuses
recent_replies   whether a deferral is the route's or a recipient's own
connection_limits how many connections, and messages on each, a server takes
meter            events by the second
refusals         refusals that may be about the sender or this host, and how they are undone
backoff          how long until the next try
maintenance      sweep, expire, resume, resend, ask, give back; the note in the relay's row
sweep            takes over what dead relays left
expiry           ends what is too late to send
progress_note    progress of a relay, in its row
in_doubt         emails in doubt, sent again or asked about
resolver         runs the user's function that may know what became of them
until_empty      end of a relay that runs until the outbox is empty
remaining        what is left to send on a route
observer         interface for metrics and traces
"""
