"""What `scripts/release` does."""
