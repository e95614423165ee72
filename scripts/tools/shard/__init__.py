"""``scripts/shard``: what operators do on a sharded cluster, through its routers."""
