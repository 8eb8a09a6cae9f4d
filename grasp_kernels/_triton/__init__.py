"""Triton kernels and their launch configurations. Imported on first use, never with the package."""
