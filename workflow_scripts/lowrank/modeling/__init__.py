"""The model code that travels inside each checkpoint."""
