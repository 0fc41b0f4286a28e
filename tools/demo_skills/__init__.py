"""The demo model's skills, one file each: how to make an example, and when an answer is right."""
