"""The step loop, and its front ends: ``llm`` answers requests, ``async_llm`` those of many callers."""
