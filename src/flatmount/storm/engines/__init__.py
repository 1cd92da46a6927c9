"""Engines: what starts the containers of a storm. One module each."""
