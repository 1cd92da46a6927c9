"""What goes over the socket: `snapshots.proto`, and the module that `make wire` generates of it."""
