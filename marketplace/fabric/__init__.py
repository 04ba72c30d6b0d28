"""How gateways and nodes reach one another: NATS, credentials, enrolment, request and reply."""
