"""Reports are made: `outbox generate`, and the scheduler that starts it.

edition         one report definition for one period; the definition that the fleet shares
recipients      recipients of an edition: keys and addresses are checked, in windows that memory can hold
source          recipients and rows: two queries, or a class of the user's
user_query      the user's queries: prepared once; errors of the query and of one row are told apart
session         the Postgres session of a run: our statements, the user's queries, the lease
buckets         advisory locks by which servers share the recipients of an edition
digest          a report over reports: what waits for an address, in one email
report_builder  one recipient's report: page and email; no database
write           the transaction that inserts report, email and delivery
batch_writer    commits batches of reports; a blocked recipient does not stop the others
edition_reports queries on the reports that an edition has, and on the suppression list
report_maker    missing reports, bucket by bucket: rows are read, reports built, and batches written
waiting         waiting for the reports that other servers make
shared_work     a window of recipients: what is missing is made here, or waited for
edition_lock    shared by the runs of an edition, exclusive for whoever removes it or declares it done
no_recipients   why an edition may have no recipients
waiver          recipients without a report, and decisions that no report is owed to them
result          counts of one run for one edition
run             the run of one edition: all windows, and what is recorded at the end
schedule_state  state of each schedule: its latest tick, the edition, the outcome
scheduler       starts `outbox generate` when a schedule ticks, until the edition is complete
"""
