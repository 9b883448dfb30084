"""The command line of `dsu`: one module per command, each with its options, one library call and its output."""
