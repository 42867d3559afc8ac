"""What one step computes: the GPT, its checkpoint, its tokenizer, the KV cache, sampling, and the executor around them."""
