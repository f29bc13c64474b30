"""Views of the problem: a network, and a change of its parameters, by name."""
