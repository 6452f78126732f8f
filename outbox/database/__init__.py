"""Access to Postgres.

connection        opens sessions; which errors mean that one is lost; advisory locks
dialing           searches for a host of a database URL that gives a session
refusal           reasons why Postgres or a pooler refuses a session, and the fix for each
lock_wait         bounded waits for locks of other sessions, and who holds them
schema            installs, upgrades and recognises schema.sql
roles             rights of each role
lanes             pairs of route and priority under which deliveries wait, in SQL
failover_barrier  the pause after a change of the primary, until the relays have reported what they sent
"""
