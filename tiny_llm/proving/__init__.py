"""Whether our GPU kernels are right and fast on this machine: tried once, remembered, and chosen by."""
