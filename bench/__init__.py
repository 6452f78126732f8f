"""Measurements and faults: real processes, real Postgres with fsync on, a sink that is not the bottleneck.

world      the machine of one run: embedded Postgres, a sink process with a journal, people, settings
fleet      N servers fire their cron at once, M relays send: rates, latencies, duplicates, losses
relay      one relay process against a bare aiosmtplib loop that has no database
baseline   that loop

faults     a fleet under faults, all from a seed, in the order of its rooms:
plan       the schedule: which fault, when, on whom, for how long
arena      the real parts that faults take hold of; each server behind proxies of its own
proxy      a network that one can break
mail       the mail server: its pace and its moods, and what reached it
nemesis    the faults, by name
record     what is known when a run is over
checker    what was accepted against what the database says: the laws, and who was wronged
timeline   the run as a picture
campaign   many seeds, a table, and the command that replays what broke

takeover   how long until others have sent what a lost relay held
"""
