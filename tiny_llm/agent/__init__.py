"""A loop of actions: a model proposes, the user allows, a log keeps what was done."""
