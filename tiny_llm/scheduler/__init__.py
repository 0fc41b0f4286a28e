"""Who runs next: queues, the token budget, preemption. Integers only."""
