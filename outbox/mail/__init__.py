"""What an email is: addresses, header fields, messages (RFC 5322), and the API by which applications send one.

header_fields      any text as the value of a header field
host_name          host names and address literals (RFC 5321)
mailbox            display names and addresses
structured_fields  further header fields, each in its own syntax
message            a message as RFC 5322 bytes
attachment         files that go with an email, and their parts of the message
body_encoding      quoted-printable and base64 of a message's parts
verp               tokens by which a bounce proves which email it is about
delivery_state     states of a delivery, from pending to sent
email              an application's email, complete and checked
enqueue            inserts an email in the application's own transaction
mime               bounded reader of MIME messages
removed_message    what stands in the place of a message that was lost or pruned
stored_message     headers, text, page and files of a stored message
"""
