"""Checks for what users get wrong, in the order in which a report travels: `outbox doctor`.

run              all checks in their order; DKIM, redirection, doubt and limits
finding          the result of a check, with a suggested fix
database         the connection, the schema, the pooler
rights           rights of the role
access           rights of others
reports          each report's queries and templates
recipients       the recipients of a report
smtp             each route's server, TLS, login and sender
smtp_visit       connections to a mail server, and the findings so far
smtp_judgements  judgements of a mail server's replies, offers and certificate
lmtp_maildir     routes that are no SMTP server
fleet            relays, routes, pauses and schedules
"""
