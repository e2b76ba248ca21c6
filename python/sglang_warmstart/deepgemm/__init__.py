"""The pipeline of exact warm-up: record, compile, load, mark. It knows DeepGEMM and nothing of SGLang."""
