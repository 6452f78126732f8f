"""The SMTP client. It knows no Postgres.

outgoing            an email on its way to a server, and a try of it
connector           opens connections to the mail server of a route
dialing             TCP connections to a host name with several addresses
helo                the name of this host in EHLO
opening             greeting, EHLO and TLS
login               AUTH
route_login         login of a route: proven once, paused after a refusal, renewed from its file
route_trouble       errors of a connection that cannot be opened
extensions          what a server offers beyond RFC 5321's minimum
connection          one SMTP connection: envelope, content, mark, final dot
connection_owner    interface between a connection and the owner of its mail
connection_history  replies of one connection so far, which decide what a refusal on it is about
commands            bytes of MAIL, RCPT and the content
replies             parser of SMTP replies
refusal             a 4xx or 5xx reply, and what it is about
reply_class         finds out what a refusal is about
reply_table         the rules for that
verdict             the outcome of a try, and its consequence: retried, or dead after the last try
content             checks and encoding of mail data
route_headers       last checks, and the header fields that a route adds
dkim                DKIM signatures
lmtp                LMTP instead of SMTP
maildir             a directory in place of a server
"""
