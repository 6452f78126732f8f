"""A trace goes from generate to the send, over real HTTP; without OTEL_ variables there is none."""

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from outbox.sandbox.smtp_sink import Reply, Stage
from tests.support.fault_levers import At
from tests.support.http_receiver import receiver

CALLER = "0af7651916cd43dd8448eb211c80319c"


def spans_of(found):
    """Every span that came, by its name."""
    by_name = {}
    for method, path, body in found.requests:
        assert (method, path) == ("POST", "/v1/traces")
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "outbox"
            for scope in resource.scope_spans:
                for span in scope.spans:
                    by_name.setdefault(span.name, []).append(span)
    return by_name


async def test_a_send_is_part_of_the_trace_in_which_its_email_was_made(fleet):
    await fleet.hire(2)
    fleet.sink.script = At(Stage.RCPT, Reply("550 <p1@example.com> unknown"), times=1)
    with receiver() as found:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": found.url}
        made = await fleet.run(
            "generate", environment={**environment, "TRACEPARENT": f"00-{CALLER}-b7ad6b7169203331-01"}
        )
        assert (made.code, made.err) == (0, "")
        sent = await fleet.run("relay", "--until-empty", environment=environment)
        assert sent.code == 0, sent
        spans = spans_of(found)
    (generate,), enqueues, sends = spans["outbox generate"], spans["outbox enqueue"], spans["outbox send"]
    assert generate.trace_id.hex() == CALLER
    assert generate.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.parent_span_id for span in enqueues} == {generate.span_id}
    assert len(sends) == 2
    assert {span.trace_id for span in sends} == {generate.trace_id}
    assert {span.parent_span_id for span in sends} <= {span.span_id for span in enqueues}
    assert all(generate.start_time_unix_nano < span.start_time_unix_nano < span.end_time_unix_nano for span in sends)
    (dead,) = [span for span in sends if span.status.code]
    assert dead.status.message.startswith("refused: 550 <address> unknown")


async def test_without_the_variables_nothing_is_traced_and_without_the_packages_it_is_said(fleet):
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    assert await fleet.connection.fetchval("SELECT traceparent FROM outbox.email") is None
    (fleet.directory / "opentelemetry.py").write_text("raise ImportError('not here')")
    environment = {"OTEL_TRACES_EXPORTER": "otlp", "PYTHONPATH": str(fleet.directory)}
    ended = await fleet.run("generate", environment=environment)
    assert ended.code == 0
    (sentence,) = ended.sentences
    assert "pip install 'outbox-mail[otel]'" in sentence
    disabled = {**environment, "OTEL_SDK_DISABLED": "true"}
    assert (await fleet.run("generate", environment=disabled)).err == ""
    muddled = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "0"}
    ended = await fleet.run("generate", environment=muddled)
    assert (ended.code, len(ended.sentences)) == (0, 1), "no report is lost for the traces' sake"
