"""Native kernels for CPUs, in C++ (`csrc/`): compiled on first use, else PyTorch's operators run."""
