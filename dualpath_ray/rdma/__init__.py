"""RDMA devices: what a machine has, which of them serves which GPU, and whether transfers can use them. Imports no RDMA library."""
