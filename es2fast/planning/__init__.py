"""What a run will need, estimated before any of it runs: `es2fast plan`."""
