"""SGLang: one file per feature. Only this room touches it."""
