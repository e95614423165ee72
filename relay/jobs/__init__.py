"""What runs in the background, each under a name."""
