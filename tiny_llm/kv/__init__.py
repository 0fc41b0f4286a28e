"""Caches of keys and values, all behind ``data.KVCache``."""
