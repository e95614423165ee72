"""What may be asked of the relay: WebSocket operations in ``ws``, HTTP requests in ``http``. No database in here."""
