"""Move a fine-tuned skill from one base model to another with five example prompts."""

__version__ = "0.1.0"
