"""What machines ask.

endpoints    HTTP endpoints of a relay: /livez, /readyz, /metrics
http_server  small HTTP server that slow clients cannot block
health       whether the relay is alive, and ready
metrics      what this relay measures
fleet        what the database knows about the fleet
completion   when an edition is complete, and the dead man's switch
systemd      notifies systemd
spans        OpenTelemetry spans of a try
"""
