"""The VA-VAE: autoencoder, its frozen target, the losses that train it, and the tokenizer in use."""
