"""Record kernels without a GPU: DeepGEMM's own host library runs against stand-ins for CUDA."""
