"""The recipe of `tiny`: assets -> rendered people -> autoencoder -> base model, each step one
resumable command."""
