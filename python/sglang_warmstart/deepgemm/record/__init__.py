"""Record which kernels DeepGEMM would compile for a target."""
