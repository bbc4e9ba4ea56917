"""One-shot pruning of a trained model."""
