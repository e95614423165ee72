"""What the relay can do on this machine, beside what its database can do alone: ``scripts/bench``."""
