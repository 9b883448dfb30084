"""The frozen encoders: SAM 2's Hiera from `sam2`, DINOv2 from `timm`, and their weights."""
