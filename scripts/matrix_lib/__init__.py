"""What `scripts/matrix` does."""
