"""A cluster of modelled workers in simulated time, routed by the real policy and by others."""
