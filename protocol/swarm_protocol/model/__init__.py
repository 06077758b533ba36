"""The models of a run, by architecture: `llama`."""
