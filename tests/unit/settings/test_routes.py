import pytest

from tests.support.settings_files import LINK, SECRET, WHOLE, faults, read


@pytest.mark.parametrize("name", ["mail.example.com", "[192.0.2.1]", "[IPv6:2001:db8::1]", " mail.example.com. "])
def test_a_name_for_ehlo_is_fully_qualified_or_an_address_literal_and_each_route_may_have_its_own(name):
    settings = read(f'helo_name = "{name}"\n{WHOLE}{ROUTE}helo_name = "bulk.example.com"')
    assert settings.helo_name == name.strip(" .")
    assert settings.on_route("bulk").helo_name == "bulk.example.com"


@pytest.mark.parametrize(
    "name", ["", "web1", "3f2a9bc41d07", "10.0.0.5", "[2001:db8::1]", "a b.example.com", "a_b.example"]
)
def test_a_name_that_servers_refuse_in_ehlo_is_refused_in_the_settings(name):
    (fault,) = faults(f'helo_name = "{name}"')
    assert fault.startswith("helo_name: ")
    assert "is not a fully qualified domain name or an address literal" in fault


ROUTE = '[routes.bulk]\nsmtp_url = "smtp://u:s3cr3t@bulk:25"\n'


def test_a_route_is_as_the_top_level_where_it_says_nothing():
    settings = read(
        f'rate = "14/s"\ndaily_max = 9\n{WHOLE}{ROUTE}rate = "2/s"\nconnections_max = 3\nreports = ["progress"]'
    )
    bulk = settings.on_route("bulk")
    assert (bulk.rate, bulk.daily_max, bulk.connections_max, str(bulk.smtp_url)) == ("2/s", 9, 3, "smtp://***@bulk:25")
    assert settings.on_route("") is settings
    assert bulk.reports == settings.reports
    assert SECRET not in repr(bulk)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('reports = ["progres"]', 'routes: bulk names the report "progres", which is not configured; mend the name,'),
        ('reports = "progress"', "routes.bulk.reports: is not a list; put it into brackets"),
        ('domains = ["a@b.example"]', "routes.bulk.domains: this is no domain; write one like example.com"),
        ('domains = ["*"]', 'routes.bulk.domains: "*" is no domain; write one like example.com'),
        ('domains = ["bücher.example"]', 'routes.bulk.domains: "bücher.example" is no domain'),
        ('domains = ["a.example", "A.example"]', "routes: a.example stands in bulk twice; keep it in one place."),
        ('rate = "fast"', 'routes.bulk.rate: "fast" is no rate; write one like'),
        ("conections_max = 3", "routes.bulk.conections_max: is not a key that outbox knows"),
        ("lease_s = 3", "routes.bulk.lease_s: belongs at the top level"),
        ('[routes.more]\nreports = ["progress"]', "routes.more.smtp_url: is missing; write one like"),
        ('[routes.Bulk]\nsmtp_url = "smtp://a:25"', "routes.Bulk: is no name for a route; use a-z"),
    ],
)
def test_a_route_that_cannot_be_is_one_sentence(said, fault):
    (sentence,) = faults(f"{WHOLE}{ROUTE}{said}")
    assert sentence.startswith(fault), sentence


def test_a_report_without_an_email_of_its_own_takes_no_route_but_the_digest_does():
    collected = f'{WHOLE}deliver = "digest"\n[digest]\nlink = "{LINK}"\n{ROUTE}'
    (sentence,) = faults(f'{collected}reports = ["progress"]')
    assert 'write "digest" in its place' in sentence
    assert read(f'{collected}reports = ["digest"]').routes["bulk"].reports == ["digest"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ('{ "References" = "<{key}@bücher.example>" }', "beyond ASCII"),
        ('{ "Sender" = "nobody" }', "Sender cannot be written: 'nobody' is no email address"),
        ('{ "List-Unsubscribe" = "" }', "is empty"),
        ('{ "X-A" = "a\\nb" }', "X-A has a line break"),
    ],
)
def test_a_field_that_could_never_be_written_is_an_error_of_the_settings(headers, said):
    (fault,) = faults(f"headers = {headers}")
    assert fault.startswith("headers")
    assert said in fault
    assert read('headers = { "Feedback-ID" = "{key}:a", "X-A" = "Grüße {email_id}" }\n' + WHOLE).headers
