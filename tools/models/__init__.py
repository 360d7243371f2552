"""Models: smollm2, fetch and mistral_tokenizer bring one in; export, fp8 and serve put one to use."""
