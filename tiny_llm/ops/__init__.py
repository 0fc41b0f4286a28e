"""The mathematics, one file an op: argument checks, the readable ``<op>_ref``, and ``<op>`` itself."""
