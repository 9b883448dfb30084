"""The network: trained layers, one per step of the paper's method, and the whole model with its frozen part."""
