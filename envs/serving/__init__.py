"""Worlds over ZeroMQ: the protocol, the server, its security, and the clients. See docs/protocol.md."""
