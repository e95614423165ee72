"""Tokens, passwords, pseudonyms and rate limits: pure parts that know no database of ours."""
