"""From a trained model to predictions, their figures and their files."""
