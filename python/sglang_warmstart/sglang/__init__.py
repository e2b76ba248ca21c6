"""SGLang: one file or folder per feature. Only this room touches SGLang."""
