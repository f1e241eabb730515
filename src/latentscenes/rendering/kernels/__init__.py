"""Fast kernels (C++ for CPUs, Triton for GPUs) of functions in plain torch. Imports rendering and core."""
