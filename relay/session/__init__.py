"""The doors: WebSocket and HTTP, tokens, the life of a connection."""
