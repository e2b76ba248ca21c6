"""DeepGEMM: record, compile, load and mark its kernels. This room knows nothing of SGLang."""
