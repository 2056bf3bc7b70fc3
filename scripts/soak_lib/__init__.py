"""What `scripts/soak` does, in the standard library alone: campaigns too long for the ordinary tests."""
