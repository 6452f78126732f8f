"""What machines ask.

endpoints    HTTP endpoints of a relay: /livez, /readyz, /metrics
http_server  small HTTP server that slow clients cannot block
health       whether the relay is alive, and ready
metrics      metrics of this relay and of the fleet
fleet        numbers of the fleet from the database, beside those of `operations.snapshot`
completion   completion of editions
dead_man     the dead man's switch, called for each complete edition
systemd      notifies systemd
spans        OpenTelemetry spans of a try
"""
