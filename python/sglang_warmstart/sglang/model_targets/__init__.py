"""The DeepGEMM targets of a model and a server's arguments, found on a machine without a GPU."""
