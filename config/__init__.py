"""Configuration: the relay's settings and its deployment files."""
