"""Reports are made: `outbox generate`, and the scheduler that starts it.

edition         one report definition for one period; the definition that the fleet shares
source          recipients and rows: two queries, or a class of the user's
user_query      the user's queries: prepared once; errors of the query and of one row are told apart
session         the Postgres session of a run: our statements, the user's queries, the lease
buckets         advisory locks by which servers share the recipients of an edition
digest          a report over reports: what waits for an address, in one email
write           the transaction that inserts report, email and delivery
batch_writer    commits batches of reports; a blocked recipient does not stop the others
edition_lock    shared by the runs of an edition, exclusive for whoever removes it or declares it done
no_recipients   why an edition may have no recipients
waiver          recipients without a report, and decisions that no report is owed to them
run             the run: buckets, missing recipients, reports
schedule_state  state of each schedule: its latest tick, the edition, the outcome
scheduler       starts `outbox generate` when a schedule ticks, until the edition is complete
"""
