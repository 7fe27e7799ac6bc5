"""What is measured on a model: perplexity, zero-shot accuracy, cost."""
