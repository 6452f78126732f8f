"""What operators read and decide.

snapshot          facts about the fleet, each read by one statement
email_counts      emails that wait, by the reason, and that are settled, by state
attention         what needs a person: the view `outbox.needs_attention`, and routes, relays, schedules
deferrals         emails that wait after a try, grouped by the server's reply
status            the state of everything, once
watch             the same continuously, with rates
wording           words for these facts in `watch` and on the board
watch_view        the screen of `outbox watch`
audit             whether an edition is sent in full, recipient by recipient
email_filter      which emails a person means: by key, edition, state or address
email_columns     columns that several lists of emails show
email_list        the newest of these emails, with their state and last reply
show              everything about one email
retry_cancel      sends emails again, or cancels them
resolve           decisions about emails in doubt and dead letters
waive             decisions that nothing is owed to a recipient
mark_done         editions that another system made
pause             begins and ends pauses
suppression_list  addresses that get no more email
operator          name of the person who runs a command
route_rules       which email takes which route
preview           one recipient's report and email, without writing anything
send_test         one email past the outbox, to try a route
prune             deletes old messages, histories and pages; the unique keys stay
"""
