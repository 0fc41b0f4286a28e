"""From a model to an answer: ``generate`` makes tokens, ``stop`` makes text of them and ends it."""
