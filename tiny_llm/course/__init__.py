"""The course: what a learner has written runs in place of the reference, and is checked."""
