"""Access to Postgres.

connection         one session: typed, ended when the server is silent; errors that mean it is lost
driver             types of asyncpg's connection
opening            opens connections: hosts, logins, session settings
dialing            searches for a host of a database URL that gives a session
engine             SQLAlchemy engines for one connection
pooler             recognises poolers that share sessions or drop settings
refusal            reasons why Postgres or a pooler refuses a session, and the fix for each
values             text that Postgres can hold; timestamps out of Python's range
plans              query plans that do not depend on statistics
locks              advisory locks of outbox and their holders
lock_wait          bounded waits for locks of other sessions, and who holds them
timeline           the WAL timeline of a server
schema             installs schema.sql, and checks its version
upgrades           the steps from each version of the schema to the next
roles              rights of each role
lanes              pairs of route and priority under which deliveries wait, in SQL
pause_list         pauses in force
suppression_entry  entries of the suppression list
failover_barrier   the pause after a change of the primary, until the relays have reported what they sent
failover_rules     when that barrier is raised and lifted
"""
