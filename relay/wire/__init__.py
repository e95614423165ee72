"""What goes over the wire, as pure code: no event loop, no database."""
