"""What `scripts/setup` does, in the standard library alone: it runs before anything is installed."""
