"""What comes back after a server has accepted an email: bounces and complaints.

dsn                 parser of delivery status notifications and complaints
report_fields       fields of a report, joined to groups
text_notices        texts of Exim, qmail and Sendmail
reported_address    addresses as reports write them
notice              what a bounce says about one recipient
bounce_class        how much a bounce counts against an address
bounce_proof        the email that a bounce proves to be about
bounces             records bounces and complaints that were verified
bounce_maildir      reads the bounces in a Maildir
bounce_key          rotation of the key of bounce tokens
suppression_import  address lists exported by providers
"""
