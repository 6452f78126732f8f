"""A fleet under faults, everything from a seed.

command      `python -m bench faults`
options      arguments, the bound within which everything must be settled, the command that replays
schedule     which fault, when, on which server, for how long
workload     people who are owed reports, and the servers' settings
server       a server: its network and its processes
mail_server  the mail server: its pace, and what it accepted
environment  all of these together: what faults act on
registry     what a fault is
process      faults of processes
postgres     faults of Postgres
network      faults of the network
nemesis      carries out the schedule
evidence     what is known when a run is over
checker      what was accepted against what the database says
report       verdict.json and timeline.svg
timeline     the run as a picture
run          one run
campaign     many seeds, a table, and the command that replays a failure
"""
