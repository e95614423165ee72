"""From the store to the sockets of this node."""
