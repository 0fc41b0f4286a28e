"""Caches of keys and values, all behind ``data.KVCache``, and the accounts of their blocks."""
