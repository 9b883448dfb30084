"""The face of `dsu`: one module a command, each only options, one call, and what a person sees."""
