"""Causal language models in Hugging Face directories, as tasks; needs the extra ``hf``."""
