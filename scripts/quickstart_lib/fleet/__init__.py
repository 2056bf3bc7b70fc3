"""What `scripts/quickstart --fleet` runs: two engines behind the router, asked in three ways."""
