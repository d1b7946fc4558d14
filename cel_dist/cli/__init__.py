"""The command line: thin commands, each of which calls one function that a Python user could call."""
