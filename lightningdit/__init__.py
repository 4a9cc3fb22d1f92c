"""VA-VAE and LightningDiT: a latent diffusion system for PyTorch."""
