"""Several processes that train one model: who they are, and how their engines hold the adapters."""
