"""What trains, a module a sentence of the paper's method, and the whole network with its split."""
