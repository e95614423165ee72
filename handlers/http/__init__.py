"""HTTP requests, one module for each noun. Each names its routes; ``routes.py`` collects them."""
