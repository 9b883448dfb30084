"""DSU-Net: DINOv2 guiding SAM 2's Hiera, trained in two stages, exactly."""

__version__ = "0.1.0"
