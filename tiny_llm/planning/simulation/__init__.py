"""Serving simulated: the real scheduler and block manager, a clock that a cost model turns, no model."""
