"""What is done: from one photo to an identity, pictures and merged checkpoints."""

__version__ = "0.1.0"
