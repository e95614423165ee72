"""Programs around the relay."""
