"""What a report is: periods, schedules, languages, and how rows become a subject, an email and a page. No I/O.

period            half-open stretches of time that a report covers, in calendar and civil time
schedule          ticks of a cron expression in civil time
timezones         names of time zones: which mean the same zone, and which is current
query_parameters  which colons in a query are parameters
language_rules    rules in which languages differ
english           the rules of English
cldr              the rules of all other languages, by Babel
language          dates, numbers and words in the reader's language
translations      the words themselves
number_format     numbers as people read them
values            values of any type as short text
columns           columns of a table: quantities, labels, totals
plain_table       tables in plain text
table             rows prepared for display: columns, totals, bars, headline
template_files    template files that are never used because of their names
template_errors   errors of templates, with file and line
jinja             Jinja environments: which files, and what is escaped
render            rows to subject, email and page (`templates/`)
"""
