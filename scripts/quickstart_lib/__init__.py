"""What `scripts/quickstart` runs once setup is done."""
