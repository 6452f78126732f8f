from outbox.relay.meter import Meter


def test_a_meter_says_how_many_there_were_in_the_busier_one_of_two_seconds():
    meter = Meter()
    for n in range(30):
        meter.note(10.0 + n / 100)
    assert meter.per_s(10.3) == 30
    meter.note(11.2)
    assert meter.per_s(11.3) == 30
    assert meter.per_s(15.0) == 0
