"""es2fast: Embedding Space Separation (arXiv 2603.20206) for safer open LLMs."""
