"""Requests and answers of the HTTP side, one module for each noun."""
