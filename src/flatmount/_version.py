"""The version, in one place: the package's metadata and `flatmount --version` read it here."""

VERSION = "0.1.0"
