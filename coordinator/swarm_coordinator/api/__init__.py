"""The coordinator's HTTP API: JSON for people, canonical CBOR for signed records, problem details for refusals."""
