"""Reports are made: `outbox generate`, and the scheduler that starts it.

edition         one report definition for one period; the definition that the fleet shares
recipients      recipients of an edition: keys and addresses are checked, in windows that memory can hold
source          recipients and rows: two queries, or a class of the user's
query_errors    errors of a query, or of the values of one call, as sentences
prepared_query  a prepared query, and which of its rows one call returns
column_types    decoding of column types on one connection
unreadable      search for the value that the driver cannot decode
user_query      the user's queries: prepared once; errors of the query and of one row are told apart
user_rows       reader of the user's queries on generate's session
kept_settings   settings of the session, which hold whatever a user's query changes
wait_bounds     bounds on the waits for answers and for locks
session         the Postgres session of a run: statements of outbox, the user's queries, the lease
buckets         advisory locks by which servers share the recipients of an edition
digest          a report over reports: what waits for an address, in one email
report_builder  one recipient's report: page and email; no database
write           the transaction that commits report, email and delivery together
batch_writer    commits batches of reports; a blocked recipient does not stop the others
edition_reports queries on the reports that an edition has, and on the suppression list
report_maker    missing reports, bucket by bucket: rows are read, reports built, and batches written
waiting         waiting for the reports that other servers make
shared_work     a window of recipients: what is missing is made here, or waited for
edition_lock    shared by the runs of an edition, held exclusively to remove it or declare it done
no_recipients   why an edition may have no recipients
waiver          recipients without a report, and those to whom none is owed
result          counts of one run for one edition
run             the run of one edition: all windows, and what is recorded at the end
schedule_state  which tick of a schedule is due, done, missed or failed
schedule_table  rows of the schedules: taken up, done, failed; the wait before the next try
child_process   a child whose output is logged; it ends with its parent
scheduler       starts `outbox generate` when a schedule ticks, until the edition is complete
"""
