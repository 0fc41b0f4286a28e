"""The engine's front ends: ``llm`` answers requests, ``conversation`` keeps a chat that fits."""
