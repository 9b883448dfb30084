"""Whether one can work here, and what to do next."""
