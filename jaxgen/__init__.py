"""jaxgen: an in-process LLM inference engine for JAX. Importing it starts no accelerator backend."""

__version__ = "0.1.0"
