"""The GANs with which the papers of this collection compare; run as python -m baselines.gan."""
