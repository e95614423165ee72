"""What is stored: one module per collection, fields and indexes, no behaviour."""
