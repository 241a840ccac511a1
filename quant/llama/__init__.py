"""A native Llama 2: the model, its tokenizer and generation."""
