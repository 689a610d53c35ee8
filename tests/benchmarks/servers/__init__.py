"""The other end of a client that is measured: each fast enough that the client is the bottleneck."""
