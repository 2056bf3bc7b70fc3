"""What `scripts/gpu-bundle` makes: everything that a bare machine with a GPU lacks, in one small folder."""
