"""What `scripts/quickstart --disaggregated` runs: an engine that prefills, one that decodes, NIXL between them."""
