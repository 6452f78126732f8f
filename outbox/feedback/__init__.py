"""What comes back after a server has accepted an email: bounces and complaints.

dsn                 parser of delivery status notifications and complaints
bounce_class        how much a bounce counts against an address
bounces             verifies and records bounces and complaints
bounce_key          rotation of the key of bounce tokens
suppression_import  address lists exported by providers
"""
