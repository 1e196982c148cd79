"""The shard's side of the wire: gRPC in, domain types out, and back. No tensor is computed here."""
