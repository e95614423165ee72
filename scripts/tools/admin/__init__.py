"""``scripts/admin``: what operators do on the relay's database, beside running relays."""
