"""Which model is in a GGUF file? The file as a model folder: config.json, model.safetensors, tokenizer files.

Follows the GGUF specification and the names, orders and defaults of llama.cpp (docs/models.md). A file that
cannot be read exactly is refused, with each key and tensor that is missing or unknown."""
