"""The Triton kernels, how they are launched, their tile sizes, and compiling them ahead of time."""
