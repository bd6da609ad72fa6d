"""Triton kernels, one file per op. Import a file here only where its backend has been chosen."""
