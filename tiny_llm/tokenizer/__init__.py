"""Text to token ids and back: the tokenizer file, chat templates, streaming text.

Knows files, strings and integers. Refuses to know models, arrays and requests.
"""
