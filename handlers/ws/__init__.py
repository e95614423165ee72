"""WebSocket operations, one module each. A handler answers at once or returns what to wait for."""
